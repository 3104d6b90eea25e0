"""Which documents equal an earlier one: pairs (document, earlier document), a file per LSH band and one of exact pairs.

Every function here is a task of its own over the signature files of all shards: bands can run on different machines.
A document is known by its shard's place in the list of signature files and its row in it, packed as shard << 32 | row,
so that smaller means earlier. Inside a task documents are counted through over all shards.

Memory: a task sorts the keys of a part of all documents at a time, about `BYTES_PER_DOCUMENT` each, in as many passes
over its column as the given memory needs. The result does not depend on the number of passes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.dedup.config import NearDedup
from megatron_moe.data.dedup.container import TableWriter, checksum, table_writer
from megatron_moe.data.dedup.signatures import SignatureFile, agreements_needed
from megatron_moe.data.dedup.units import I64, U64

KIND = "pairs"
BYTES_PER_DOCUMENT = 56
DEFAULT_MEMORY = 1 << 30
# Candidates whose sketches are in memory together: 8 MiB of them with 128 permutations, and some copies.
_CANDIDATES_AT_ONCE = 1 << 16
# How often the documents of a bucket that are not like its first one look for another first one among themselves.
_LEADERS = 16


@dataclass(frozen=True)
class Shards:
    """The signature files of all shards in their order, and how documents are numbered over them."""

    files: tuple[SignatureFile, ...]
    begins: I64
    """The number of the first document of each shard, and of all documents at the end."""

    @staticmethod
    def open(paths: Sequence[Path], near: NearDedup | None) -> "Shards":
        """Open the files and count their documents."""
        files = tuple(SignatureFile(path, near) for path in paths)
        return Shards(files, np.cumsum([0, *(file.documents for file in files)], dtype=np.int64))

    @property
    def documents(self) -> int:
        """How many documents there are in all shards."""
        return int(self.begins[-1])

    @property
    def fingerprint(self) -> str:
        """Names the shards in their order and their numbers of documents."""
        listing = "\n".join(f"{file.path.name}\t{file.documents}" for file in self.files)
        return f"{checksum(listing.encode()):016x}"

    def pack(self, numbers: I64) -> U64:
        """The ids (shard << 32 | row) of documents counted through."""
        shard = np.searchsorted(self.begins, numbers, side="right") - 1
        return (shard.astype(np.uint64) << np.uint64(32)) | (numbers - self.begins[shard]).astype(np.uint64)

    def unpack(self, ids: U64) -> I64:
        """The numbers of documents with these ids."""
        result: I64 = self.begins[(ids >> np.uint64(32)).astype(np.int64)]
        result += (ids & np.uint64(0xFFFFFFFF)).astype(np.int64)
        return result

    def sketches(self, numbers: I64) -> npt.NDArray[np.uint8]:
        """The sketches of documents counted through, given in ascending order."""
        cuts = np.searchsorted(numbers, self.begins)
        pieces = [
            file.sketches(numbers[first:last] - begin)
            for file, begin, first, last in zip(self.files, self.begins[:-1], cuts[:-1], cuts[1:], strict=True)
            if first < last
        ]
        return np.concatenate(pieces)


def match_exact(
    signature_files: Sequence[Path], near: NearDedup | None, output: Path, memory: int = DEFAULT_MEMORY
) -> None:
    """Write the pairs of documents with the same text.

    Args:
        signature_files: one per shard, in the order of the shards.
        near: what the files were made with.
        output: the pairs.
        memory: bytes to use for sorting.
    """
    shards = Shards.open(signature_files, near)
    with table_writer(output, KIND, {"of": "exact", "near": None, "shards": shards.fingerprint}) as writer:
        passes = _passes(shards.documents, memory)
        for part in range(passes):
            for group, (members, low) in _buckets(*_gather(_exact_columns(shards), part, passes)):
                # Keys equal in 64 of 128 bits are nearly always of equal texts, but only nearly.
                order = np.lexsort((members, low, group))
                members, low, group = members[order], low[order], group[order]
                new = np.ones(len(members), dtype=bool)
                new[1:] = (group[1:] != group[:-1]) | (low[1:] != low[:-1])
                _write_pairs(writer, shards, members, members[_last_true(new)], ~new)


def match_band(
    signature_files: Sequence[Path], band: int, near: NearDedup, output: Path, memory: int = DEFAULT_MEMORY
) -> None:
    """Write the pairs that one band of the LSH finds.

    The documents of a bucket are compared with its first one; those that are not like it, with the first among
    themselves, and so on.

    Args:
        signature_files: one per shard, in the order of the shards.
        band: which band, from 0.
        near: what the files were made with.
        output: the pairs.
        memory: bytes to use for sorting.
    """
    if not 0 <= band < near.bands:
        raise UserError(f"band {band}: must be between 0 and {near.bands - 1}")
    shards = Shards.open(signature_files, near)
    with table_writer(output, KIND, {"of": band, "near": near.as_dict(), "shards": shards.fingerprint}) as writer:
        passes = _passes(shards.documents, memory)
        for part in range(passes):
            for group, (members,) in _buckets(*_gather(_band_columns(shards, band), part, passes)):
                _match_buckets(writer, shards, near, members, group)


def _passes(documents: int, memory: int) -> int:
    return max(1, -(-documents * BYTES_PER_DOCUMENT // memory))


# Keys to sort by; the documents' numbers and whatever else goes with them; which documents take part.
Block = tuple[U64, tuple[npt.NDArray[Any], ...], npt.NDArray[np.bool_]]


def _exact_columns(shards: Shards) -> Iterator[Block]:
    """The upper half of the keys, and the lower half to go with it."""
    for file, shard_begin in zip(shards.files, shards.begins[:-1], strict=True):
        for begin, keys in file.exact():
            numbers = np.arange(shard_begin + begin, shard_begin + begin + len(keys))
            yield keys[:, 0], (numbers, keys[:, 1]), np.ones(len(keys), dtype=bool)


def _band_columns(shards: Shards, band: int) -> Iterator[Block]:
    for file, shard_begin in zip(shards.files, shards.begins[:-1], strict=True):
        for begin, keys, comparable in file.band(band):
            yield keys, (np.arange(shard_begin + begin, shard_begin + begin + len(keys)),), comparable


def _gather(blocks: Iterator[Block], part: int, passes: int) -> tuple[npt.NDArray[Any], ...]:
    """The keys of one pass (a range of keys) and what goes with them, documents ascending."""
    found: list[tuple[npt.NDArray[Any], ...]] = []
    for keys, others, chosen in blocks:
        rows = np.flatnonzero(chosen & (((keys >> np.uint64(32)) * np.uint64(passes)) >> np.uint64(32) == part))
        found.append((keys[rows], *(other[rows] for other in others)))
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def _buckets(*columns: npt.NDArray[Any]) -> Iterator[tuple[I64, tuple[npt.NDArray[Any], ...]]]:
    """The number of the bucket and all but the keys of documents whose key another one has too; both ascending.

    Given in pieces of at most `_CANDIDATES_AT_ONCE` and whole buckets; a larger bucket comes in several pieces, each of
    which begins with the bucket's first document.
    """
    if not columns:
        return
    keys, *others = columns
    del columns
    # Stable, so documents with the same key stay ascending; each array goes as soon as the next one is made.
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    equal = keys[1:] == keys[:-1]
    shared = np.zeros(len(keys), dtype=bool)
    shared[1:] = equal
    shared[:-1] |= equal
    keys = keys[shared]
    order = order[shared]
    for place in range(len(others)):
        others[place] = others[place][order]
    del order, shared, equal
    begins = _group_begins(keys)
    ends = np.append(begins[1:], len(keys))
    del keys
    first = 0
    while first < len(begins):
        last = max(int(np.searchsorted(ends, begins[first] + _CANDIDATES_AT_ONCE, side="right")), first + 1)
        begin, end = int(begins[first]), int(ends[last - 1])
        if end - begin <= _CANDIDATES_AT_ONCE:
            group = np.repeat(np.arange(first, last), ends[first:last] - begins[first:last])
            yield group, tuple(other[begin:end] for other in others)
        else:
            for more in range(begin + 1, end, _CANDIDATES_AT_ONCE - 1):
                rows = np.append(begin, np.arange(more, min(end, more + _CANDIDATES_AT_ONCE - 1)))
                yield np.zeros(len(rows), dtype=np.int64), tuple(other[rows] for other in others)
        first = last


def _group_begins(values: npt.NDArray[Any]) -> I64:
    """Where a new value begins in a sorted array."""
    return np.flatnonzero(np.concatenate((np.ones(min(len(values), 1), dtype=bool), values[1:] != values[:-1])))


def _last_true(marks: npt.NDArray[np.bool_]) -> I64:
    """For each place the last marked place up to it."""
    places: I64 = np.maximum.accumulate(np.where(marks, np.arange(len(marks)), 0))
    return places


def _match_buckets(writer: TableWriter, shards: Shards, near: NearDedup, members: I64, group: I64) -> None:
    """Compare the documents of whole buckets with their first one, the rest with the first of the rest, and so on."""
    if not near.verify:
        new = np.concatenate(([True], group[1:] != group[:-1]))
        _write_pairs(writer, shards, members, members[_last_true(new)], ~new)
        return
    unique, place = np.unique(members, return_inverse=True)
    sketches = shards.sketches(unique)[place]
    needed = agreements_needed(near)
    rest = np.arange(len(members))
    found: list[tuple[I64, I64, I64]] = []
    for _ in range(_LEADERS):
        new = np.concatenate(([True], group[rest][1:] != group[rest][:-1]))
        leaders = rest[_last_true(new)]
        agree = np.count_nonzero(sketches[rest] == sketches[leaders], axis=1)
        like = (agree >= needed) & ~new
        found.append((members[rest[like]], members[leaders[like]], group[rest[like]]))
        rest = rest[~like & ~new]
        if not len(rest):
            break
    later, earlier, bucket = (np.concatenate(column) for column in zip(*found, strict=True))
    # By key, then by document: the same order for every number of passes.
    order = np.lexsort((later, bucket))
    _write_pairs(writer, shards, later[order], earlier[order], np.ones(len(later), dtype=bool))


def _write_pairs(writer: TableWriter, shards: Shards, later: I64, earlier: I64, chosen: npt.NDArray[np.bool_]) -> None:
    if chosen.any():
        writer.add(np.stack([shards.pack(later[chosen]), shards.pack(earlier[chosen])], axis=1).astype("<u8"))
