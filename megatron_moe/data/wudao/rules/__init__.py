"""The rules that recipes are made of, a subject a file."""

from megatron_moe.data.wudao.rules.base import Cleaner, Filter, Rule
from megatron_moe.data.wudao.rules.language import Language
from megatron_moe.data.wudao.rules.length import HanRatio, Length, LineLength
from megatron_moe.data.wudao.rules.markup import Html, Scripts
from megatron_moe.data.wudao.rules.pai import Pai
from megatron_moe.data.wudao.rules.paragraphs import ShortParagraphs
from megatron_moe.data.wudao.rules.privacy import BankCards, Contacts, Emails, IdCards, Phones, Urls
from megatron_moe.data.wudao.rules.punctuation import Punctuation
from megatron_moe.data.wudao.rules.repetition import RepeatedLines, RepeatedNgrams
from megatron_moe.data.wudao.rules.script import Simplified
from megatron_moe.data.wudao.rules.sentences import LastSentence
from megatron_moe.data.wudao.rules.title import Title
from megatron_moe.data.wudao.rules.unicode import Control, Forms, Garbage, Mojibake
from megatron_moe.data.wudao.rules.whitespace import SpelledOut, Whitespace
from megatron_moe.data.wudao.rules.words import Advertising, SensitiveWords

RULES: tuple[type[Rule], ...] = (
    Pai,
    Mojibake,
    Control,
    Html,
    Scripts,
    Forms,
    Garbage,
    Simplified,
    SpelledOut,
    Urls,
    Emails,
    IdCards,
    BankCards,
    Phones,
    Contacts,
    Whitespace,
    Punctuation,
    Advertising,
    ShortParagraphs,
    LastSentence,
    Length,
    HanRatio,
    LineLength,
    RepeatedLines,
    RepeatedNgrams,
    SensitiveWords,
    Language,
    Title,
)
"""Every rule, in the order in which they work best: characters, residue, layout, then whole documents."""

__all__ = ["RULES", "Cleaner", "Filter", "Rule"]
