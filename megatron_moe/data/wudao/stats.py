"""What happened to the documents of a task, in numbers and samples that add up over tasks in any order.

A rule reports only when it changes or drops something, so documents that pass cost next to nothing here. Samples are
those with the lowest hash of their place in the input: the same ones whatever ran where.
"""

import heapq
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

SAMPLES = 10
# Lengths are counted by powers of two: bucket n holds those of n binary digits.
BUCKETS = 33
# Names of types that are counted one by one; broken input could have millions.
MOST_TYPES, OTHER_TYPES, _LONGEST_TYPE = 1000, "(other types)", 60
# Reasons name the number that decided, which would make each of them unique.
_NUMBER = re.compile(r"[0-9][0-9.,]*")
_BEFORE, _LONGEST = 30, 240
_MASK = (1 << 64) - 1

JsonObject = dict[str, Any]


def place_hash(seed: int, number: int) -> int:
    """A well-mixed 64-bit hash of a document's place (splitmix64)."""
    value = (seed + number * 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def named_lengths(lengths: Sequence[int]) -> dict[str, int]:
    """Counts by powers of two as counts by ranges of lengths, from the shortest to the longest that occurs."""
    used = [place for place, count in enumerate(lengths) if count]
    labels = ["0", "1", *(f"{1 << place - 1:,}-{(1 << place) - 1:,}" for place in range(2, BUCKETS))]
    return {labels[place]: lengths[place] for place in range(used[0], used[-1] + 1)} if used else {}


class Samples:
    """The samples with the lowest hashes."""

    def __init__(self, entries: Iterable[tuple[int, JsonObject]] = ()) -> None:
        # A heap with the highest hash first: negated. The number keeps dictionaries from being compared.
        self._heap: list[tuple[int, int, JsonObject]] = []
        self._number = 0
        for key, sample in entries:
            if self.wants(key):
                self.add(key, sample)

    def wants(self, key: int) -> bool:
        """Whether a sample with this hash would be kept now."""
        return len(self._heap) < SAMPLES or key < -self._heap[0][0]

    def add(self, key: int, sample: JsonObject) -> None:
        """Keep a sample that is wanted."""
        self._number += 1
        heapq.heappush(self._heap, (-key, self._number, sample))
        if len(self._heap) > SAMPLES:
            heapq.heappop(self._heap)

    def entries(self) -> list[tuple[int, JsonObject]]:
        """Hash and sample, lowest first."""
        return sorted(((-key, sample) for key, _, sample in self._heap), key=lambda entry: entry[0])


@dataclass
class RuleStats:
    """What one rule did."""

    changed: int = 0
    dropped: int = 0
    characters_removed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    changes: Samples = field(default_factory=Samples)
    drops: Samples = field(default_factory=Samples)

    def merge(self, other: Self) -> None:
        """Add what the rule did elsewhere."""
        self.changed += other.changed
        self.dropped += other.dropped
        self.characters_removed += other.characters_removed
        self.reasons.update(other.reasons)
        self.changes = Samples([*self.changes.entries(), *other.changes.entries()])
        self.drops = Samples([*self.drops.entries(), *other.drops.entries()])

    def as_dict(self) -> JsonObject:
        """For a task's marker, with the hashes of the samples."""
        return {
            **_numbers(self),
            "reasons": dict(self.reasons),
            "changes": self.changes.entries(),
            "drops": self.drops.entries(),
        }

    @staticmethod
    def from_dict(values: JsonObject) -> "RuleStats":
        """The inverse of `as_dict`."""
        rest = {name: values[name] for name in ("changed", "dropped", "characters_removed")}
        return RuleStats(
            **rest,
            reasons=Counter(values["reasons"]),
            changes=Samples(values["changes"]),
            drops=Samples(values["drops"]),
        )


def _numbers(stats: Any) -> JsonObject:
    return {name: value for name, value in vars(stats).items() if type(value) is int}


@dataclass
class Amount:
    """Some documents: how many, how long, and of which type."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    by_type: dict[str, list[int]] = field(default_factory=dict)
    """Documents and characters of each `dataType`."""

    def merge(self, other: Self, times: int = 1) -> None:
        """Add other documents; `times` -1 takes them away."""
        self.documents += times * other.documents
        self.characters += times * other.characters
        self.bytes += times * other.bytes
        self.lengths = [mine + times * theirs for mine, theirs in zip(self.lengths, other.lengths, strict=True)]
        for name, (documents, characters) in other.by_type.items():
            known = name in self.by_type or len(self.by_type) < MOST_TYPES
            mine = self.by_type.setdefault(name if known else OTHER_TYPES, [0, 0])
            mine[0] += times * documents
            mine[1] += times * characters

    def as_dict(self) -> JsonObject:
        """For a task's marker."""
        return {**_numbers(self), "lengths": self.lengths, "by_type": self.by_type}


class Tally:
    """Lengths and types of documents, a few bytes each, in their order.

    Args:
        types: names of the types, for a tally that is read back.
        columns: characters, bytes, and place in `types`, of each document.
    """

    def __init__(self, types: Sequence[str] = (), columns: npt.NDArray[np.uint32] | None = None) -> None:
        self.types = list(types)
        self._places = {name: place for place, name in enumerate(self.types)}
        stored = [b"", b"", b""] if columns is None else [column.tobytes() for column in columns]
        self._characters, self._bytes, self._types = (array("I", column) for column in stored)

    def add(self, texts: Sequence[str], data_types: Sequence[Any]) -> None:
        """Count documents."""
        self._characters.extend(map(len, texts))
        self._bytes.extend([len(text.encode()) for text in texts])
        known = self._places.get
        places = [known(name) if type(name) is str else known("") for name in data_types]
        if None in places:
            places = [self._place(name) for name in data_types]
        self._types.extend(places)

    def _place(self, data_type: Any) -> int:
        name = data_type[:_LONGEST_TYPE] if type(data_type) is str else ""
        if name not in self._places and len(self.types) >= MOST_TYPES:
            name = OTHER_TYPES
        if name not in self._places:
            self._places[name] = len(self.types)
            self.types.append(name)
        return self._places[name]

    @property
    def columns(self) -> npt.NDArray[np.uint32]:
        """Characters, bytes and type of every document: shape [3, documents]."""
        return np.array([self._characters, self._bytes, self._types], dtype=np.uint32)

    def amount(self, rows: npt.NDArray[np.uint32] | None = None) -> Amount:
        """All of them together, or those in some rows."""
        columns = self.columns.astype(np.int64)
        characters, size, types = columns if rows is None else columns[:, rows]
        digits = np.frexp(characters.astype(np.float64))[1]
        documents_of = np.bincount(types, minlength=len(self.types))
        characters_of = np.bincount(types, characters, minlength=len(self.types))
        by_type = {
            name: [int(documents_of[place]), int(characters_of[place])]
            for place, name in enumerate(self.types)
            if documents_of[place]
        }
        lengths = np.bincount(digits, minlength=BUCKETS).tolist()
        return Amount(len(characters), int(characters.sum()), int(size.sum()), lengths, by_type)


class CleanStats:
    """What cleaning did to the documents of a task; it is the `Watch` that rules report to.

    Args:
        name: of the task, from which the hashes of samples are made.
    """

    def __init__(self, name: str = "") -> None:
        self.read = Amount()
        self.kept = Amount()
        self.rules: dict[str, RuleStats] = {}
        self.faults: Counter[str] = Counter()
        # The document that is being cleaned: its number in the task.
        self.number = 0
        self._seed = zlib.crc32(name.encode()) << 32
        self._name = name

    def changed(self, rule: str, before: str, after: str) -> None:
        """A rule changed the text of the document."""
        stats = self._rule(rule)
        stats.changed += 1
        stats.characters_removed += len(before) - len(after)
        key = place_hash(self._seed + zlib.crc32(rule.encode()), self.number)
        if stats.changes.wants(key):
            old, new = difference(before, after)
            stats.changes.add(key, {"document": self._document(), "before": old, "after": new})

    def dropped(self, rule: str, reason: str, text: str) -> None:
        """A rule dropped the document."""
        stats = self._rule(rule)
        stats.dropped += 1
        stats.characters_removed += len(text)
        stats.reasons[_NUMBER.sub("#", reason)] += 1
        key = place_hash(self._seed + zlib.crc32(rule.encode()), self.number)
        if stats.drops.wants(key):
            stats.drops.add(key, {"document": self._document(), "reason": reason, "before": text[:_LONGEST]})

    def _rule(self, rule: str) -> RuleStats:
        stats = self.rules.get(rule)
        if stats is None:
            stats = self.rules[rule] = RuleStats()
        return stats

    def _document(self) -> str:
        return f"{self._name} document {self.number}"

    def merge(self, other: Self) -> None:
        """Add the stats of another task."""
        self.read.merge(other.read)
        self.kept.merge(other.kept)
        self.faults.update(other.faults)
        for rule, stats in other.rules.items():
            self._rule(rule).merge(stats)

    def as_dict(self) -> JsonObject:
        """For a task's marker."""
        return {
            "read": self.read.as_dict(),
            "kept": self.kept.as_dict(),
            "faults": dict(self.faults),
            "rules": {rule: stats.as_dict() for rule, stats in self.rules.items()},
        }

    @staticmethod
    def from_dict(values: JsonObject) -> "CleanStats":
        """The inverse of `as_dict`."""
        stats = CleanStats()
        stats.read = Amount(**values["read"])
        stats.kept = Amount(**values["kept"])
        stats.faults = Counter(values["faults"])
        stats.rules = {rule: RuleStats.from_dict(entry) for rule, entry in values["rules"].items()}
        return stats


def difference(before: str, after: str) -> tuple[str, str]:
    """The part of two texts around their first difference, short enough to be shown."""
    low, high = 0, min(len(before), len(after))
    while low < high:
        middle = (low + high + 1) // 2
        if before[:middle] == after[:middle]:
            low = middle
        else:
            high = middle - 1
    start = max(0, low - _BEFORE)
    return _shown(before, start), _shown(after, start)


def _shown(text: str, start: int) -> str:
    end = start + _LONGEST
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")
