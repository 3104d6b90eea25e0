"""What decides which documents count as near duplicates and which as contaminated, and the curve of the parameters."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.base import ConfigError

# Above this an n-gram is a sentence, and one edit hides a copy.
_LONGEST_NGRAM = 64


@dataclass(frozen=True)
class NearDedup:
    """MinHash LSH over n-grams of units (a Han character or a word, see `units`).

    Two documents become candidates when all rows of at least one band agree, and duplicates when their signatures
    also agree in `threshold` of all permutations.
    """

    ngram: int = 5
    """Units in an n-gram. Documents with fewer units are compared exactly only."""
    permutations: int = 128
    """Length of a signature: the estimate of a similarity J has the standard error sqrt(J(1-J)/permutations)."""
    bands: int = 18
    """Groups of permutations, each of which makes candidates."""
    rows: int = 7
    """Permutations in a band, which must all agree."""
    threshold: float = 0.75
    """Least estimated Jaccard similarity of duplicates."""
    verify: bool = True
    """Whether candidates must reach the threshold; without it every candidate is a duplicate."""
    seed: int = 1
    """Which hash functions."""

    def __post_init__(self) -> None:
        limits = {
            "ngram": (1 <= self.ngram <= _LONGEST_NGRAM, f"between 1 and {_LONGEST_NGRAM}"),
            "permutations": (
                self.permutations.bit_count() == 1 and 2 <= self.permutations <= 4096,
                "a power of two between 2 and 4096",
            ),
            "bands": (self.bands >= 1, "at least 1"),
            "rows": (self.rows >= 1, "at least 1"),
            "threshold": (0.0 < self.threshold <= 1.0, "above 0 and at most 1"),
            "seed": (0 <= self.seed < 1 << 64, "between 0 and 2^64 - 1"),
        }
        for name, (fine, legal) in limits.items():
            if not fine:
                raise ConfigError(f"near_dedup: {name} {getattr(self, name)}: must be {legal}")
        if self.bands * self.rows > self.permutations:
            raise ConfigError(
                f"near_dedup: bands {self.bands} x rows {self.rows} = {self.bands * self.rows}: "
                f"must be at most the {self.permutations} permutations"
            )

    def as_dict(self) -> dict[str, int | float | bool]:
        """The fields, for headers and fingerprints."""
        return dataclasses.asdict(self)

    def of_signatures(self) -> dict[str, int | float | bool]:
        """The fields that signatures depend on: another threshold can be tried with the same signature files."""
        return {name: value for name, value in self.as_dict().items() if name not in ("threshold", "verify")}


def s_curve(bands: int, rows: int, jaccard: float) -> float:
    """The probability that documents of this similarity become candidates."""
    return 1.0 - (1.0 - jaccard**rows) ** bands


@dataclass(frozen=True)
class Decontamination:
    """Which documents overlap with evaluation sets: those that share runs of units with their texts."""

    files: tuple[str, ...] = ()
    """Evaluation files: .jsonl, .json, .txt (a text a line), .csv, .tsv, .parquet, each also as .gz or .zst."""
    fields: tuple[str, ...] = ()
    """Which fields of the records hold text; every string in the record when empty."""
    ngram: int = 13
    """Units in a run: characters of Chinese, words of English."""
    hits: int = 1
    """How many different runs of the document must be in the evaluation sets."""
    share: float = 0.0
    """Which share of the document's runs must be in the evaluation sets."""
    short: Literal["equal", "skip"] = "equal"
    """What evaluation texts of fewer units do: `equal` drops documents equal to them as a whole, `skip` nothing."""

    def __post_init__(self) -> None:
        limits = {
            "ngram": (1 <= self.ngram <= _LONGEST_NGRAM, f"between 1 and {_LONGEST_NGRAM}"),
            "hits": (self.hits >= 1, "at least 1"),
            "share": (0.0 <= self.share <= 1.0, "between 0 and 1"),
            "short": (self.short in ("equal", "skip"), "equal or skip"),
        }
        for name, (fine, legal) in limits.items():
            if not fine:
                raise ConfigError(f"decontamination: {name} {getattr(self, name)}: must be {legal}")
