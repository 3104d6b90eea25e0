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

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.dedup.config import NearDedup
from megatron_moe.data.dedup.container import TableWriter, checksum, table_writer
from megatron_moe.data.dedup.signatures import SignatureFile, agreements_needed
from megatron_moe.data.dedup.units import I64, U64

KIND = "pairs"
BYTES_PER_DOCUMENT = 48
DEFAULT_MEMORY = 1 << 30
# Candidates whose sketches are in memory together: 32 MiB of them with 128 permutations.
_CANDIDATES_AT_ONCE = 1 << 18
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
            for members, group in _buckets(*_gather(_exact_columns(shards, 0), part, passes)):
                # Keys equal in 64 of 128 bits are nearly always of equal texts, but only nearly.
                low = _exact_low(shards, members)
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
            for members, group in _buckets(*_gather(_band_columns(shards, band), part, passes)):
                _match_buckets(writer, shards, near, members, group)


def _passes(documents: int, memory: int) -> int:
    return max(1, -(-documents * BYTES_PER_DOCUMENT // memory))


Columns = Iterator[tuple[int, U64, npt.NDArray[np.bool_] | None]]


def _exact_columns(shards: Shards, half: int) -> Columns:
    for file, shard_begin in zip(shards.files, shards.begins[:-1], strict=True):
        for begin, keys in file.exact():
            yield int(shard_begin) + begin, keys[:, half], None


def _band_columns(shards: Shards, band: int) -> Columns:
    for file, shard_begin in zip(shards.files, shards.begins[:-1], strict=True):
        for begin, keys, comparable in file.band(band):
            yield int(shard_begin) + begin, keys, comparable


def _gather(columns: Columns, part: int, passes: int) -> tuple[U64, I64]:
    """The keys of one pass (a range of keys), and whose they are, documents ascending."""
    keys_found: list[U64] = []
    numbers_found: list[I64] = []
    for begin, keys, comparable in columns:
        chosen = ((keys >> np.uint64(32)) * np.uint64(passes)) >> np.uint64(32) == part
        if comparable is not None:
            chosen &= comparable
        rows = np.flatnonzero(chosen)
        keys_found.append(keys[rows])
        numbers_found.append(rows + begin)
    if not keys_found:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    return np.concatenate(keys_found), np.concatenate(numbers_found)


def _buckets(keys: U64, numbers: I64) -> Iterator[tuple[I64, I64]]:
    """Documents with a key that another one has too, and the number of their bucket; keys and documents ascending.

    Given in pieces of at most `_CANDIDATES_AT_ONCE` and whole buckets; a larger bucket comes in several pieces, each of
    which begins with the bucket's first document.
    """
    order = np.argsort(keys)
    keys = keys[order]
    equal = keys[1:] == keys[:-1]
    shared = np.zeros(len(keys), dtype=bool)
    shared[1:] = equal
    shared[:-1] |= equal
    keys, order = keys[shared], order[shared]
    if not len(keys):
        return
    members = numbers[order]
    del order, shared, equal
    group = np.cumsum(np.concatenate(([True], keys[1:] != keys[:-1]))) - 1
    order = np.lexsort((members, group))
    members, group = members[order], group[order]
    begins = np.flatnonzero(np.concatenate(([True], group[1:] != group[:-1])))
    ends = np.append(begins[1:], len(members))
    first = 0
    while first < len(begins):
        last = max(int(np.searchsorted(ends, begins[first] + _CANDIDATES_AT_ONCE, side="right")), first + 1)
        begin, end = int(begins[first]), int(ends[last - 1])
        yield (
            members[begin : min(end, begin + _CANDIDATES_AT_ONCE)],
            group[begin : min(end, begin + _CANDIDATES_AT_ONCE)],
        )
        for more in range(begin + _CANDIDATES_AT_ONCE, end, _CANDIDATES_AT_ONCE - 1):
            rows = np.arange(more, min(end, more + _CANDIDATES_AT_ONCE - 1))
            yield np.append(members[begin], members[rows]), np.append(group[begin], group[rows])
        first = last


def _last_true(marks: npt.NDArray[np.bool_]) -> I64:
    """For each place the last marked place up to it."""
    places: I64 = np.maximum.accumulate(np.where(marks, np.arange(len(marks)), 0))
    return places


def _exact_low(shards: Shards, members: I64) -> U64:
    """The other half of the exact keys of some documents."""
    ascending = np.argsort(members)
    wanted = members[ascending]
    result = np.empty(len(members), dtype=np.uint64)
    for begin, keys, _ in _exact_columns(shards, 1):
        first, last = np.searchsorted(wanted, [begin, begin + len(keys)])
        result[ascending[first:last]] = keys[wanted[first:last] - begin]
    return result


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
