"""What decides a tokenizer beside its text, and the character coverage that fits a vocabulary."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.sample import SampleOptions
from megatron_moe.data.tokenizer.symbols import Symbols
from megatron_moe.data.tokenizer.train import MIN_COVERAGE, REQUIRED

# The usual coverage for Chinese.
_MAX_COVERAGE = 0.9995
# Room for learned pieces in the smallest vocabulary that is worth having.
_LEAST_LEARNED = 256


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What decides a tokenizer beside its text.

    Attributes:
        vocab_size: pieces, symbols and bytes among them.
        model_type: `bpe`, or `unigram` (which has no Hugging Face export).
        character_coverage: share of the characters with pieces of their own. Default: 0.9995, or less (down to
            0.98) where single characters would take more than half of the vocabulary and leave no room for words.
        split_by_unicode_script: keep Han, punctuation and letters in pieces of their own.
        symbols: reserved tokens and user symbols.
        sample: what to read and hold out.
    """

    vocab_size: int = 50_000
    model_type: str = "bpe"
    character_coverage: float | None = None
    split_by_unicode_script: bool = False
    symbols: Symbols = field(default_factory=Symbols)
    sample: SampleOptions = field(default_factory=SampleOptions)

    def __post_init__(self) -> None:
        least = self.symbols.count + len(REQUIRED) + _LEAST_LEARNED
        if self.vocab_size < least:
            raise UserError(
                f"--vocab-size {self.vocab_size}: must be at least {least} ({least - _LEAST_LEARNED} pieces are "
                "symbols, bytes and punctuation)"
            )
        coverage = self.character_coverage
        if coverage is not None and not MIN_COVERAGE <= coverage <= 1:
            raise UserError(f"--character-coverage {coverage}: must be in [{MIN_COVERAGE}, 1]")
        if self.model_type not in ("bpe", "unigram"):
            raise UserError(f"--model-type {self.model_type}: must be bpe or unigram")
        if self.sample.sentences < 1:
            raise UserError(f"--input-sentences {self.sample.sentences}: must be at least 1")
        if self.sample.heldout_every < 0 or self.sample.heldout_every == 1:
            raise UserError(f"--heldout-every {self.sample.heldout_every}: must be 0 (nothing held out) or at least 2")


def choose_coverage(counts: npt.NDArray[np.int64], vocab_size: int, symbols: int) -> float:
    """The character coverage for a vocabulary: 0.9995 unless characters would then fill more than half of it.

    At 8000 pieces 0.9995 spends about 7000 on single characters, so that hardly a word remains. Never below
    0.98, the least that SentencePiece takes.

    Args:
        counts: how often each character occurs.
        vocab_size: pieces of the vocabulary.
        symbols: of them, those that are no learned pieces.
    """
    budget = max(1, (vocab_size - symbols) // 2)
    covered = int(np.sort(counts)[::-1][:budget].sum())
    return max(MIN_COVERAGE, min(_MAX_COVERAGE, covered / max(1, int(counts.sum()))))
