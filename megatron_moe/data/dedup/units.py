"""Text as units: one Han character or one word, folded, without punctuation and space; and hashes of runs of units.

Near-deduplication and decontamination both compare n-grams of these units, so a change of layout, punctuation, case or
full-width form does not hide a copy. For Chinese a unit is a character; for a script with spaces it is a word, so that
a 13-gram of English is 13 words, not two. No Python object is made per unit: a batch is a few numpy arrays.
"""

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

# The upper bit of an entry of the table marks a character that joins with its neighbours into a word.
_WORD = np.uint32(1 << 31)
# Letters, marks and numbers are kept; punctuation, symbols, separators, control and private characters are not.
_KEPT_CATEGORIES = frozenset({"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No"})
# Assigned characters other than private ones and format controls end below this (Unicode 15: U+323AF).
_LAST_ASSIGNED = 0x34000
# Written without spaces although not wide: Thai, Lao, Tibetan, Myanmar, Khmer.
_UNSPACED = ((0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF))
# Blocks in which every assigned character is a Han character or syllable that folds to itself.
_PLAIN_BLOCKS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x20000, 0x2F7FF), (0x30000, _LAST_ASSIGNED))

# Odd multipliers with bits all over, from the digits of murmur3's finaliser and of the golden ratio.
_MURMUR = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_IN_WORD = 0x9E3779B97F4A7C15
_IN_GRAM = 0xD6E8FEB86659FD93
# glibc takes arrays of 128 KiB and more from fresh pages: 15,000 numbers of 8 bytes stay below.
_CHARACTERS_AT_ONCE = 15_000


@functools.cache
def fold_table() -> npt.NDArray[np.uint32]:
    """Per code point: 0 for what is dropped, else the folded code point, with the upper bit set in a word."""
    table = np.zeros(0x110000, dtype=np.uint32)
    for code in range(_LAST_ASSIGNED):
        character = chr(code)
        if unicodedata.category(character) not in _KEPT_CATEGORIES:
            continue
        if not _inside(code, _PLAIN_BLOCKS):
            character = _fold(character)
        table[code] = np.uint32(ord(character)) | (np.uint32(0) if _alone(character) else _WORD)
    return table


def _inside(code: int, blocks: Sequence[tuple[int, int]]) -> bool:
    return any(first <= code <= last for first, last in blocks)


def _fold(character: str) -> str:
    """The compatibility form in small letters where that is one character: １ and ① become 1, Ａ becomes a."""
    for form in (unicodedata.normalize("NFKC", character).lower(), character.lower()):
        if len(form) == 1 and unicodedata.category(form) in _KEPT_CATEGORIES:
            return form
    return character


def _alone(character: str) -> bool:
    """Whether the character is a unit by itself: wide letters (Han, kana, hangul) and scripts without spaces."""
    return unicodedata.east_asian_width(character) == "W" or _inside(ord(character), _UNSPACED)


@functools.cache
def fold_version() -> str:
    """Names the table: signatures made with another Unicode version cannot be compared."""
    return xxhash.xxh3_64_hexdigest(fold_table().astype("<u4").tobytes())


@dataclass(frozen=True, slots=True)
class Units:
    """The units of a batch of documents, one after the other."""

    hashes: U64
    """One value per unit: the folded code point, or the hash of a word's code points."""
    offsets: I64
    """Units of document i are hashes[offsets[i]:offsets[i + 1]]."""

    def counts(self) -> I64:
        """How many units each document has."""
        return np.diff(self.offsets)


def pieces_of(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cut a batch so that the arrays of a piece stay in the cache and below the allocator's limit for fresh pages.

    Larger pieces spend half of their time on page faults. The cut does not change any result.
    """
    begin = characters = 0
    for index, text in enumerate(texts):
        characters += len(text)
        if characters >= _CHARACTERS_AT_ONCE:
            yield texts[begin : index + 1]
            begin, characters = index + 1, 0
    if begin < len(texts):
        yield texts[begin:]


def units_of(texts: Sequence[str]) -> Units:
    """Split a batch of documents into units."""
    # The newline ends a word, so no unit reaches from one document into the next.
    folded, in_word, starts = _starts("\n".join(texts) + "\n")
    positions = np.flatnonzero(starts)
    hashes = folded[positions].astype(np.uint64)
    is_word = hashes >= _WORD
    if is_word.any():
        hashes[is_word] = _word_hashes(np.flatnonzero(in_word), folded)
    lengths = np.fromiter(map(len, texts), dtype=np.int64, count=len(texts))
    edges = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum(lengths + 1, out=edges[1:])
    return Units(hashes, np.searchsorted(positions, edges).astype(np.int64))


def _starts(text: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Entry of the table per character, which characters are in words, and which begin a unit."""
    raw = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    folded = fold_table().take(raw)
    in_word = folded >= _WORD
    starts = folded != 0
    starts[1:] &= ~(in_word[1:] & in_word[:-1])
    return folded, in_word, starts


def _word_hashes(positions: I64, folded: npt.NDArray[np.uint32]) -> U64:
    """The polynomial hash of each run of neighbouring positions."""
    first = np.empty(len(positions), dtype=bool)
    first[0] = True
    np.not_equal(positions[1:], positions[:-1] + 1, out=first[1:])
    begins = np.flatnonzero(first)
    lengths = np.diff(begins, append=len(positions))
    place = np.arange(len(positions)) - np.repeat(begins, lengths)
    powers = np.ones(int(lengths.max()), dtype=np.uint64)
    powers[1:] = np.uint64(_IN_WORD)
    powers = np.cumprod(powers, dtype=np.uint64)
    codes = (folded[positions] & ~_WORD).astype(np.uint64)
    sums: U64 = np.add.reduceat(codes * powers[place], begins)
    return sums


def unit_strings(text: str) -> list[str]:
    """The units of one document as strings, the slow way: for exact comparison, and to test the arrays against."""
    table = fold_table()
    units: list[str] = []
    in_word = False
    for character in text:
        entry = int(table[ord(character)])
        word = entry >= int(_WORD)
        if entry:
            folded = chr(entry & ~int(_WORD) & 0xFFFFFFFF)
            if word and in_word:
                units[-1] += folded
            else:
                units.append(folded)
        in_word = word
    return units


@dataclass(frozen=True, slots=True)
class Grams:
    """The n-grams of a batch of documents; none reaches over the end of a document."""

    hashes: U64
    document: I64
    """Which document of the batch each n-gram is from, ascending."""
    counts: I64
    """How many n-grams each document has: 0 where it is shorter than n."""
    positions: I64
    """The first unit of each n-gram, counted over the whole batch."""


def grams_of(units: Units, n: int) -> Grams:
    """Well-mixed 64-bit hashes of every n units that follow each other in one document."""
    counts = np.maximum(units.counts() - (n - 1), 0)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    positions = np.arange(total) + np.repeat(units.offsets[:-1] - (ends - counts), counts)
    hashes = _rolling(units.hashes, n)[positions] if total else np.zeros(0, dtype=np.uint64)
    return Grams(mix(hashes), np.repeat(np.arange(len(counts)), counts), counts, positions)


def _rolling(values: U64, n: int) -> U64:
    """At i: the polynomial over values[i:i+n], by joining runs of 1, 2, 4, ... values."""
    result: U64 | None = None
    covered, width, run = 0, 1, values
    while True:
        if n & width:
            result = run if result is None else _joined(result, run, covered, width)
            covered += width
        if covered == n:
            assert result is not None
            return result
        run = _joined(run, run, width, width)
        width *= 2


def _joined(left: U64, right: U64, left_width: int, right_width: int) -> U64:
    """The run of `left` followed by the run of `right`."""
    count = len(right) - left_width
    result: U64 = left[:count] * np.uint64(pow(_IN_GRAM, right_width, 1 << 64))
    result += right[left_width:]
    return result


def mix(hashes: U64) -> U64:
    """Spread every bit over all 64 (the finaliser of murmur3), in place."""
    for multiplier in _MURMUR:
        hashes ^= hashes >> np.uint64(33)
        hashes *= multiplier
    hashes ^= hashes >> np.uint64(33)
    return hashes
