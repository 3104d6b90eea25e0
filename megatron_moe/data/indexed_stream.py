"""Reading pairs of any size in little memory: nothing is mapped, and all numbers are checked as they go by."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.indexed import HEADER, bin_path, idx_path, read_header

# Numbers in memory at a time.
_BLOCK = 1 << 18


class PairReader:
    """One pair, opened; use it as a context manager.

    Attributes:
        prefix: path without ending.
        header: what the index says of itself.

    Raises:
        UserError: a file is missing, cannot be read, or is no Megatron index.
    """

    def __init__(self, prefix: str | Path, flag: str) -> None:
        self.prefix = prefix
        self.where = f"{flag} {prefix}"
        try:
            self.header = read_header(prefix, flag)
            self._index: BinaryIO = idx_path(prefix).open("rb")
            self.tokens: BinaryIO = bin_path(prefix).open("rb")
        except OSError as error:
            raise UserError(f"{self.where}: the pair cannot be read: {error.strerror}") from error

    def lengths(self) -> Iterator[npt.NDArray[np.int32]]:
        """Tokens of each sequence, in blocks; offsets and the size of the token file are checked against them."""
        end = 0
        for start, count in _blocks(self.header.sequences):
            lengths = self._int32(HEADER.size + 4 * start, count)
            offsets = self._int64(self.header.offsets_start + 8 * start, count)
            ends = end + np.cumsum(lengths, dtype=np.int64) * self.header.dtype.itemsize
            sizes = lengths.astype(np.int64) * self.header.dtype.itemsize
            if int(lengths.min()) < 0 or not np.array_equal(offsets + sizes, ends):
                raise self._damaged("has offsets that its lengths do not give")
            end = int(ends[-1])
            yield lengths
        found = bin_path(self.prefix).stat().st_size
        if found != end:
            raise self._damaged(f"announces {end} bytes of tokens, but {bin_path(self.prefix)} holds {found}")

    def document_ends(self) -> Iterator[npt.NDArray[np.int64]]:
        """The number of sequences where each document ends, in blocks."""
        last = int(self._int64(self.header.marks_start, 1)[0]) if self.header.documents >= 0 else -1
        wrong = self._damaged("divides its sequences into documents wrongly")
        if last != 0:
            raise wrong
        for start, count in _blocks(self.header.documents):
            ends = self._int64(self.header.marks_start + 8 * (start + 1), count)
            if int(ends[0]) < last or bool(np.any(np.diff(ends) < 0)):
                raise wrong
            last = int(ends[-1])
            yield ends
        if last != self.header.sequences:
            raise wrong

    def document_lengths(self) -> Iterator[npt.NDArray[np.int64]]:
        """Tokens of each document, in blocks."""
        ends = self.document_ends()
        waiting = np.empty(0, np.int64)
        # Sequences and tokens before the block, and tokens before the document that is not yet over.
        sequences = tokens = begun = 0
        for lengths in self.lengths():
            running = tokens + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
            after = sequences + len(lengths)
            while True:
                if not len(waiting):
                    block = next(ends, None)
                    if block is None:
                        break
                    waiting = block
                inside = int(np.searchsorted(waiting, after, side="right"))
                document_ends = running[waiting[:inside] - sequences]
                if inside:
                    yield np.diff(document_ends, prepend=begun)
                    begun = int(document_ends[-1])
                waiting = waiting[inside:]
                if len(waiting):
                    break
            sequences, tokens = after, int(running[-1])

    def document(self, index: int) -> list[npt.NDArray[np.integer]]:
        """The sequences of one document, found without reading what stands before it."""
        first, end = self._int64(self.header.marks_start + 8 * index, 2)
        count = int(end - first)
        if count == 0:
            return []
        lengths = self._int32(HEADER.size + 4 * int(first), count)
        offset = int(self._int64(self.header.offsets_start + 8 * int(first), 1)[0])
        total = int(lengths.sum(dtype=np.int64))
        self.tokens.seek(offset)
        content = self.tokens.read(total * self.header.dtype.itemsize)
        if len(content) != total * self.header.dtype.itemsize:
            raise self._damaged(f"names tokens that {bin_path(self.prefix)} does not hold")
        return np.split(np.frombuffer(content, self.header.dtype), np.cumsum(lengths)[:-1])

    def _int32(self, offset: int, count: int) -> npt.NDArray[np.int32]:
        return np.frombuffer(self._read(offset, 4 * count), "<i4")

    def _int64(self, offset: int, count: int) -> npt.NDArray[np.int64]:
        return np.frombuffer(self._read(offset, 8 * count), "<i8")

    def _read(self, offset: int, size: int) -> bytes:
        self._index.seek(offset)
        content = self._index.read(size)
        if len(content) != size:
            raise self._damaged("was cut short")
        return content

    def _damaged(self, problem: str) -> UserError:
        return UserError(f"{self.where}: {idx_path(self.prefix)} {problem}; run tools/preprocess_data.py again")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._index.close()
            self.tokens.close()


def _blocks(total: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, _BLOCK):
        yield start, min(_BLOCK, total - start)
