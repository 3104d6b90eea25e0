"""Signatures of documents: an exact 128-bit key, keys of the LSH bands, and a sketch; made in batches, kept in files.

A signature file belongs to one shard of documents and holds, in the order of the shard, 16 + 4 bytes a document for
exact deduplication and, with the default parameters, 18 x 8 bytes of band keys and 128 of sketch: 292 bytes. It is cut
into groups of 65,536 documents, in which each column is contiguous, so that a task reads one band without the others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_moe.config.base import UserError
from megatron_moe.data.dedup.config import NearDedup
from megatron_moe.data.dedup.container import broken, checksum, opened, read_array, write_end, write_header
from megatron_moe.data.dedup.minhash import minhash, odd_numbers
from megatron_moe.data.dedup.units import I64, U64, fold_version, grams_of, mix, pieces_of, units_of
from megatron_moe.data.files import atomic_file

KIND = "signatures"
GROUP = 65536


@dataclass(frozen=True, slots=True)
class Signatures:
    """Signatures of some documents, one row each."""

    exact: U64
    """[documents, 2]: the 128-bit key of the text."""
    grams: npt.NDArray[np.uint32]
    """[documents]: how many n-grams; a document with 0 is compared exactly only."""
    bands: U64
    """[documents, bands]: documents with an equal key in a band are candidates."""
    sketch: npt.NDArray[np.uint8]
    """[documents, permutations]: the last 8 bits of each least hash."""

    def __len__(self) -> int:
        return len(self.exact)


def estimated_jaccard(left: npt.NDArray[np.uint8], right: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """The similarity of the n-gram sets behind sketches, by rows.

    Different least hashes have equal last 8 bits once in 256, which is taken out again: b-bit minwise hashing (Li and
    König 2010). The result is below 0 for less agreement than chance.
    """
    agree: npt.NDArray[np.float64] = np.mean(left == right, axis=-1)
    return (agree - 1 / 256) / (1 - 1 / 256)


def agreements_needed(near: NearDedup) -> int:
    """How many equal places of two sketches make the estimate reach the threshold."""
    share = near.threshold * (1 - 1 / 256) + 1 / 256
    return int(np.ceil(near.permutations * share - 1e-9))


class Signer:
    """Makes signatures of batches of texts; the result does not depend on how the texts are batched.

    Args:
        near: parameters of near-deduplication; None makes only the exact keys.
    """

    def __init__(self, near: NearDedup | None) -> None:
        self.near = near

    def sign(self, texts: Sequence[str]) -> Signatures:
        """The signatures of the texts as they are; the exact key is of the very text, in UTF-8."""
        exact = exact_keys(texts)
        pieces = [self._sign_near(piece) for piece in pieces_of(texts)] if self.near else []
        bands, width = (self.near.bands, self.near.permutations) if self.near else (0, 0)
        if not pieces:
            pieces = [
                (np.zeros(len(texts), np.uint32), np.zeros((len(texts), bands), np.uint64), _no_sketch(texts, width))
            ]
        grams, keys, sketch = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Signatures(exact, grams, keys, sketch)

    def _sign_near(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], U64, npt.NDArray[np.uint8]]:
        assert self.near is not None
        near = self.near
        grams = grams_of(units_of(texts), near.ngram)
        least = minhash(grams, near.permutations, near.seed)
        return grams.counts.astype(np.uint32), band_keys(least, near), (least & np.uint64(0xFF)).astype(np.uint8)


def _no_sketch(texts: Sequence[str], width: int) -> npt.NDArray[np.uint8]:
    return np.zeros((len(texts), width), np.uint8)


def exact_keys(texts: Sequence[str]) -> U64:
    """The 128-bit xxh3 hash of each text, shape [texts, 2]."""
    digests = b"".join([xxhash.xxh3_128_digest(text.encode("utf-8", "surrogatepass")) for text in texts])
    return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def band_keys(least: U64, near: NearDedup) -> U64:
    """One hash over the rows of each band; the band's number is in it, so bands never match each other."""
    values = least[:, : near.bands * near.rows].reshape(len(least), near.bands, near.rows)
    keys = values @ odd_numbers(near.seed ^ 0xBA2D, near.rows)
    keys += np.arange(near.bands, dtype=np.uint64)
    return mix(keys)


def _columns(near: NearDedup | None) -> list[tuple[str, int]]:
    """Type and width of each column of a group, in their order."""
    columns = [("<u8", 2), ("<u4", 1)]
    if near:
        columns += [("<u8", 1)] * near.bands + [("<u1", near.permutations)]
    return columns


def _header(near: NearDedup | None) -> dict[str, Any]:
    return {"near": near.of_signatures() if near else None, "units": fold_version() if near else None, "group": GROUP}


class SignatureWriter:
    """Appends signatures to a file; use `signature_writer`."""

    def __init__(self, stream: BinaryIO, near: NearDedup | None) -> None:
        self._stream = stream
        self._near = near
        self._waiting: list[Signatures] = []
        self._waiting_rows = 0
        self.documents = 0
        self._header = write_header(stream, KIND, _header(near))

    def add(self, signatures: Signatures) -> None:
        """Append the signatures of the next documents of the shard."""
        self._waiting.append(signatures)
        self._waiting_rows += len(signatures)
        self.documents += len(signatures)
        if self._waiting_rows >= GROUP:
            joined = _concatenate(self._waiting)
            whole = len(joined) - len(joined) % GROUP
            for begin in range(0, whole, GROUP):
                self._write_group(_slice(joined, begin, begin + GROUP))
            self._waiting = [_slice(joined, whole, len(joined))]
            self._waiting_rows = len(joined) - whole

    def finish(self) -> None:
        """Write the last group and the end mark."""
        if self._waiting_rows:
            self._write_group(_concatenate(self._waiting))
        write_end(self._stream, self.documents, checksum(self._header))

    def _write_group(self, group: Signatures) -> None:
        columns: list[npt.NDArray[Any]] = [group.exact, group.grams]
        if self._near:
            columns += [*group.bands.T, group.sketch]
        packed = [
            np.ascontiguousarray(column, dtype=kind)
            for column, (kind, _) in zip(columns, _columns(self._near), strict=True)
        ]
        self._stream.write(np.array([checksum(column) for column in packed], dtype="<u8").tobytes())
        for column in packed:
            self._stream.write(column.tobytes())


def _concatenate(parts: Sequence[Signatures]) -> Signatures:
    return Signatures(
        np.concatenate([part.exact for part in parts]),
        np.concatenate([part.grams for part in parts]),
        np.concatenate([part.bands for part in parts]),
        np.concatenate([part.sketch for part in parts]),
    )


def _slice(signatures: Signatures, begin: int, end: int) -> Signatures:
    return Signatures(
        signatures.exact[begin:end],
        signatures.grams[begin:end],
        signatures.bands[begin:end],
        signatures.sketch[begin:end],
    )


@contextmanager
def signature_writer(path: Path, near: NearDedup | None) -> Iterator[SignatureWriter]:
    """A signature file to write, which gets its name when all documents of its shard are in it."""
    with atomic_file(path) as stream:
        writer = SignatureWriter(stream, near)
        yield writer
        writer.finish()


class SignatureFile:
    """Reads columns of a signature file, each checked against its checksum.

    Raises:
        UserError: the file is missing, damaged, cut short, of another version or made with other parameters.
    """

    def __init__(self, path: Path, near: NearDedup | None) -> None:
        self.path = path
        self._near = near
        with opened(path, KIND) as (_, fields, count, expected):
            wanted = _header(near)
            for name in ("near", "units", "group"):
                if fields.get(name) != wanted[name]:
                    raise UserError(
                        f"{path}: was made with {name} {fields.get(name)}, not {wanted[name]}; clean its shard again"
                    )
            self._begin, size = fields["body"]
            self.documents = int(count)
            if checksum(fields["line"]) != expected or size != self._offset_of(self._full_groups) + self._group_bytes(
                self.documents % GROUP
            ):
                raise broken(path, KIND)

    @property
    def _full_groups(self) -> int:
        return self.documents // GROUP

    @cached_property
    def _widths(self) -> list[int]:
        """Bytes a document takes in each column."""
        return [np.dtype(kind).itemsize * width for kind, width in _columns(self._near)]

    def _group_bytes(self, documents: int) -> int:
        return 8 * len(self._widths) + documents * sum(self._widths) if documents else 0

    def _offset_of(self, group: int) -> int:
        return group * self._group_bytes(GROUP)

    def groups(self) -> Iterator[tuple[int, int]]:
        """The first document of each group, and how many there are in it."""
        for begin in range(0, self.documents, GROUP):
            yield begin, min(GROUP, self.documents - begin)

    def exact(self) -> Iterator[tuple[int, U64]]:
        """First document and exact keys [documents, 2] of each group."""
        for begin, keys in self._read(0):
            yield begin, keys.reshape(-1, 2)

    def band(self, number: int) -> Iterator[tuple[int, U64, npt.NDArray[np.bool_]]]:
        """First document, keys of one band, and which documents have n-grams at all, of each group."""
        for (begin, grams), (_, keys) in zip(self._read(1), self._read(2 + number), strict=True):
            yield begin, keys, grams > 0

    def sketches(self, rows: I64) -> npt.NDArray[np.uint8]:
        """The sketches of some documents, given in ascending order; not checked, since only pieces are read."""
        assert self._near is not None
        width = self._near.permutations
        result = np.empty((len(rows), width), dtype=np.uint8)
        cuts = np.searchsorted(rows, [begin for begin, _ in self.groups()] + [self.documents])
        for (begin, documents), first, last in zip(self.groups(), cuts[:-1], cuts[1:], strict=True):
            if first == last:
                continue
            skip = 8 * len(self._widths) + documents * sum(self._widths[:-1])
            offset = self._begin + self._offset_of(begin // GROUP) + skip
            stored = np.memmap(self.path, dtype=np.uint8, mode="r", offset=offset, shape=(documents, width))
            result[first:last] = stored[rows[first:last] - begin]
        return result

    def whole(self, column: int) -> npt.NDArray[Any]:
        """One column of all documents, [documents, width]: 0 exact, 1 grams, then the bands and the sketch."""
        kind, width = _columns(self._near)[column]
        pieces = [np.zeros(0, kind), *(values for _, values in self._read(column))]
        return np.concatenate(pieces).reshape(self.documents, width)

    def _read(self, column: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """First document and one column of each group."""
        kind, width = _columns(self._near)[column]
        with opened(self.path, KIND) as (stream, *_):
            for begin, documents in self.groups():
                start = self._begin + self._offset_of(begin // GROUP)
                stream.seek(start + 8 * column)
                expected = int(read_array(stream, "<u8", 1, self.path, KIND)[0])
                stream.seek(start + 8 * len(self._widths) + documents * sum(self._widths[:column]))
                values = read_array(stream, kind, documents * width, self.path, KIND)
                if checksum(values) != expected:
                    raise broken(self.path, KIND)
                yield begin, values


def read_signatures(path: Path, near: NearDedup | None) -> Signatures:
    """A whole signature file in memory."""
    file = SignatureFile(path, near)
    bands = near.bands if near else 0
    columns = [file.whole(number) for number in range(len(_columns(near)))]
    return Signatures(
        columns[0],
        columns[1][:, 0],
        np.concatenate([np.zeros((file.documents, 0), np.uint64), *columns[2 : 2 + bands]], axis=1),
        columns[-1] if near else np.zeros((file.documents, 0), np.uint8),
    )
