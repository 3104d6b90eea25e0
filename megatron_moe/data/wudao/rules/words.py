"""Advertising and sensitive words from a user's list, judged by density: one word never decides.

A list is a UTF-8 file with a word a line; what follows a tab is ignored, as are empty lines and those that begin
with #. Deleting words, or every document with one, takes law, medicine and news from a corpus.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from megatron_moe.config.base import UserError
from megatron_moe.data.files import require_package
from megatron_moe.data.wudao.rules.base import Cleaner, Filter, Rule
from megatron_moe.data.wudao.rules.characters import View


@functools.cache
def read_words(path: str) -> tuple[str, ...]:
    """The words of a list, each once, in order.

    Raises:
        UserError: it cannot be read, is not UTF-8, or has no word.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"word list {path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"word list {path}: is not UTF-8 at byte {error.start}") from error
    words = [line.split("\t")[0].strip() for line in text.splitlines() if not line.startswith("#")]
    found = tuple(dict.fromkeys(word for word in words if word))
    if not found:
        raise UserError(f"word list {path}: has no words; give one a line")
    return found


@functools.cache
def _automaton(path: str) -> Any:
    """Finds all words of a list in one pass."""
    automaton = require_package("ahocorasick", path).Automaton()
    for word in read_words(path):
        automaton.add_word(word, word)
    automaton.make_automaton()
    return automaton


def _digest(path: str) -> str:
    return hashlib.sha256("\n".join(read_words(path)).encode()).hexdigest()


def _found(path: str, text: str) -> list[tuple[int, str]]:
    """End and word of the longest matches that do not overlap, from the left."""
    found: list[tuple[int, str]] = list(_automaton(path).iter_long(text))
    return found


class _Listed(Rule):
    """What rules with a list of words share."""

    file: str

    @property
    def idle(self) -> bool:
        """Without a list."""
        return not self.file

    def prepare(self) -> None:
        """Read the list."""
        _automaton(self.file)

    def identity(self) -> dict[str, Any]:
        """With what is in the list, not where it lies."""
        identity = super().identity()
        identity["options"]["file"] = _digest(self.file)
        return identity


@dataclass(frozen=True)
class Advertising(_Listed, Cleaner):
    """Drops lines dense with words of a list: 加微信, 扫码关注, 点击购买."""

    file: str = ""
    """The list; without one the rule does nothing."""
    distinct: int = 2
    """Drop lines with at least so many different words, when also ..."""
    share: float = 0.1
    """... at least this share of the line's characters is in such words."""

    name: ClassVar[str] = "advertising"
    source: ClassVar[str] = "WuDaoCorpora (advertising); two words and 0.1 of the line are ours"
    destroys: ClassVar[str] = "lines about advertising, if the list is broad"
    adds: ClassVar[bool] = False
    settled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require(self.distinct >= 1, "distinct", "at least 1")
        self.require_share("share")

    def clean(self, text: str) -> str:
        """Drop the lines."""
        if not _found(self.file, text):
            return text
        lines = text.split("\n")
        kept = [line for line in lines if not self._dense(line)]
        return text if len(kept) == len(lines) else "\n".join(kept)

    def _dense(self, line: str) -> bool:
        words = [word for _, word in _found(self.file, line)]
        return len(set(words)) >= self.distinct and sum(map(len, words)) >= self.share * len(line)


@dataclass(frozen=True)
class SensitiveWords(_Listed, Filter):
    """Drops documents dense with words of a list."""

    file: str = ""
    """The list; without one the rule does nothing."""
    per_line: float = 0.5
    """Drop documents with more different words than this for each line, when also ..."""
    distinct: int = 3
    """... so many different words are found: a single line with one word is no reason."""
    share: float = 0.1
    """... and at least this share of the characters is in such words: statutes and news about crime have less."""

    name: ClassVar[str] = "sensitive_words"
    source: ClassVar[str] = (
        "EvalWeb (0.5 words for each line); the other two are ours (data-juicer has a share of 0.017 alone)"
    )
    destroys: ClassVar[str] = "law, medicine and news about the subject, if the list is broad"

    def __post_init__(self) -> None:
        self.require_count("per_line", "distinct")
        self.require_share("share")

    def reason(self, view: View) -> str | None:
        """Compare the density."""
        words = [word for _, word in _found(self.file, view.text)]
        distinct = len(set(words))
        lines = sum(1 for line in view.text.split("\n") if line.strip()) if words else 1
        if distinct < max(1, self.distinct) or distinct <= self.per_line * lines:
            return None
        if sum(map(len, words)) < self.share * len(view.text):
            return None
        shown = "、".join(sorted(set(words))[:5])
        return f"{distinct} listed words in {lines} lines: {shown}"
