"""Writing Megatron's token files, of any size in little memory; `indexed.py` describes their layout."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, BinaryIO, Protocol, Self

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError, disk_error
from megatron_moe.data.indexed import CODE_OF_DTYPE, HEADER, MAGIC, bin_path, idx_path

# Bytes copied from file to file at a time.
_COPY = 1 << 22


class Readable(Protocol):
    """What tokens can be copied from."""

    def read(self, size: int, /) -> bytes:
        """The next bytes, at most `size`."""
        ...


class IndexedWriter:
    """Writes a pair under temporary names and shows it under `prefix` only when it is complete.

    Use it as a context manager; leaving it by an exception removes what was written and leaves an earlier
    pair of that prefix as it was. The columns of the index wait in nameless files, so that memory does not
    grow with the number of documents, and every position is counted in 64 bits.

    Args:
        prefix: path of the pair without ending; missing folders are made.
        dtype: uint16 or int32, see `token_dtype`.
        scratch: folder on the same disk for the temporary files; the pair's own by default.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype, scratch: Path | None = None) -> None:
        self._prefix = prefix
        self._dtype = np.dtype(dtype)
        self._code = CODE_OF_DTYPE[self._dtype]
        self.sequences = self.documents = self.tokens = 0
        # Sequences that belong to a document.
        self._marked = 0
        folder = Path(bin_path(prefix)).parent if scratch is None else scratch
        suffix = f".{os.getpid()}.tmp"
        self._bin_tmp = folder / (bin_path(prefix).name + suffix)
        self._idx_tmp = folder / (idx_path(prefix).name + suffix)
        try:
            Path(bin_path(prefix)).parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            self._columns: list[IO[bytes]] = [tempfile.TemporaryFile(dir=folder) for _ in range(3)]  # noqa: SIM115
            self._stream = self._bin_tmp.open("wb")
        except OSError as error:
            raise UserError(f"{bin_path(prefix)}: cannot write there: {error.strerror}") from error

    def add(
        self,
        tokens: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer],
        documents: npt.NDArray[np.integer] | None = None,
    ) -> None:
        """Append documents.

        Args:
            tokens: [sum(lengths)] the ids of all documents one after the other, already of the pair's dtype.
            lengths: [sequences] tokens in each.
            documents: [documents] sequences of each document; None: every sequence is one.
        """
        if tokens.dtype != self._dtype or int(lengths.sum(dtype=np.int64)) != tokens.size:
            raise ValueError(
                f"expected {int(lengths.sum(dtype=np.int64))} tokens of {self._dtype}, "
                f"got {tokens.size} of {tokens.dtype}"
            )
        with self._disk_errors():
            self._stream.write(tokens.tobytes())
        self._add_lengths(lengths)
        self._add_counts(documents)

    def add_stored(
        self,
        source: Readable,
        lengths: npt.NDArray[np.integer],
        documents: npt.NDArray[np.integer] | None = None,
    ) -> None:
        """Append documents whose tokens stand in a file, from its position on.

        Raises:
            EOFError: the file ends before them.
        """
        self.add_sequences(source, lengths)
        self._add_counts(documents)

    def add_sequences(self, source: Readable, lengths: npt.NDArray[np.integer]) -> None:
        """Append sequences that stand in a file, without saying yet which documents they are; see `add_marks`.

        Raises:
            EOFError: the file ends before them.
        """
        with self._disk_errors():
            copy_bytes(source, self._stream, int(lengths.sum(dtype=np.int64)) * self._dtype.itemsize)
        self._add_lengths(lengths)

    def add_marks(self, ends: npt.NDArray[np.int64]) -> None:
        """Append documents by the number of sequences in the pair where each ends."""
        if len(ends):
            if int(ends[0]) < self._marked or bool(np.any(np.diff(ends) < 0)):
                raise ValueError("documents must end one after the other")
            with self._disk_errors():
                self._columns[2].write(ends.astype("<i8").tobytes())
            self.documents += len(ends)
            self._marked = int(ends[-1])

    def _add_lengths(self, lengths: npt.NDArray[np.integer]) -> None:
        ends = self.tokens + np.cumsum(lengths, dtype=np.int64)
        with self._disk_errors():
            self._columns[0].write(lengths.astype("<i4").tobytes())
            self._columns[1].write(((ends - lengths) * self._dtype.itemsize).astype("<i8").tobytes())
        self.sequences += len(lengths)
        self.tokens = int(ends[-1]) if len(ends) else self.tokens

    def _add_counts(self, documents: npt.NDArray[np.integer] | None) -> None:
        """Mark documents of so many sequences each; None: of one, up to the last sequence."""
        if documents is None:
            self.add_marks(np.arange(self._marked + 1, self.sequences + 1, dtype=np.int64))
        else:
            self.add_marks(self._marked + np.cumsum(documents, dtype=np.int64))
        if self._marked != self.sequences:
            raise ValueError(f"{self.sequences} sequences, but documents of {self._marked}")

    def close(self) -> None:
        """Write the index and give the pair its names.

        An index is what makes a pair exist, and two renames are not one step: so the old index goes first and
        the new one comes last, and at no moment does an index stand beside a token file it does not describe.
        """
        if self._marked != self.sequences:
            raise ValueError(f"{self.sequences} sequences, but documents of {self._marked}")
        self._sync(self._stream)
        with self._idx_tmp.open("wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, self._code, self.sequences, self.documents + 1))
            lengths, offsets, marks = self._columns
            for column, first in ((lengths, b""), (offsets, b""), (marks, bytes(8))):
                stream.write(first)
                size = column.tell()
                column.seek(0)
                copy_bytes(column, stream, size)
            self._sync(stream)
        idx_path(self._prefix).unlink(missing_ok=True)
        self._bin_tmp.replace(bin_path(self._prefix))
        self._idx_tmp.replace(idx_path(self._prefix))

    @staticmethod
    def _sync(stream: BinaryIO) -> None:
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(str(bin_path(self._prefix)), error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._disk_errors():
                    self.close()
        finally:
            # Closing tries once more what a failed write has left in the buffer.
            for stream in (self._stream, *self._columns):
                with contextlib.suppress(OSError):
                    stream.close()
            self._bin_tmp.unlink(missing_ok=True)
            self._idx_tmp.unlink(missing_ok=True)


def copy_bytes(source: Readable, target: IO[bytes], count: int) -> None:
    """Copy so many bytes from one file's position to another's.

    Raises:
        EOFError: the source has fewer.
    """
    while count > 0:
        block = source.read(min(count, _COPY))
        if not block:
            raise EOFError(f"{count} bytes are missing")
        target.write(block)
        count -= len(block)
