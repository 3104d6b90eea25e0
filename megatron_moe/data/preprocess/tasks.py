"""The pieces that preprocessing divides its input into; they depend on the files alone, never on the workers.

A file of lines is cut every so many bytes of its text, and a line belongs to the piece it begins in. How much text a
compressed file holds is not known before it is read: its pieces go on until one says that the file has ended. Parquet
is cut at row groups.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.base import UserError
from megatron_moe.data.files import COMPRESSIONS, base_suffix
from megatron_moe.data.preprocess.parquet import row_group_bytes

_LARGE_FILE = 512 << 20
# A second's work of one core; smaller for files where that would leave cores without work.
_LARGE_PIECE = 32 << 20
_SMALL_PIECE = 4 << 20


@dataclass(frozen=True)
class Task:
    """One piece of one file.

    Attributes:
        path: the file.
        name: tells this piece of this file from all others; another file under the same path has other names.
        number: which piece of the file it is.
        start, stop: bytes of its text, or row groups of Parquet.
        share: bytes on the disk that it stands for; 0 where that is known only later.
    """

    path: Path
    name: str
    number: int
    start: int
    stop: int
    share: int

    @property
    def compressed(self) -> bool:
        """Whether the file's text has to be unpacked, so that nobody knows where it ends."""
        return self.path.suffix.lower() in COMPRESSIONS

    @property
    def parquet(self) -> bool:
        """Whether the range counts row groups."""
        return base_suffix(self.path) == ".parquet"


class Plan:
    """All pieces of the files, in order.

    Attributes:
        inputs: the files.
        last: for compressed files the number of the last piece, once it is known.
    """

    def __init__(self, inputs: Sequence[Path]) -> None:
        self.inputs = inputs
        self.last: dict[Path, int] = {}
        self._names = {path: file_name(path) for path in inputs}
        self._row_groups: dict[Path, list[tuple[int, int, int]]] = {}

    def __iter__(self) -> Iterator[Task]:
        for path in self.inputs:
            name = self._names[path]
            for number, (start, stop, share) in enumerate(self._ranges(path)):
                yield Task(path, f"{name}-{number:06d}", number, start, stop, share)

    def ended(self, task: Task) -> None:
        """Note that a compressed file ends in this piece or before it."""
        self.last[task.path] = min(task.number, self.last.get(task.path, task.number))

    def check_unchanged(self) -> None:
        """The files must be those that were read.

        Raises:
            UserError: one was written again meanwhile.
        """
        for path in self.inputs:
            if not path.is_file() or file_name(path) != self._names[path]:
                raise UserError(f"--input {path}: was changed while it was read; start again")

    def _ranges(self, path: Path) -> Iterator[tuple[int, int, int]]:
        if base_suffix(path) == ".parquet":
            if path not in self._row_groups:
                self._row_groups[path] = list(_row_groups(path))
            yield from self._row_groups[path]
            return
        size = path.stat().st_size
        piece = _LARGE_PIECE if size >= _LARGE_FILE else _SMALL_PIECE
        if path.suffix.lower() not in COMPRESSIONS:
            for start in range(0, size, piece):
                yield start, start + piece, min(piece, size - start)
            return
        number = 0
        while number <= self.last.get(path, number):
            yield number * piece, (number + 1) * piece, 0
            number += 1


def file_name(path: Path) -> str:
    """A short name of a file as it is now: another after it was written again."""
    stat = path.stat()
    key = f"{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _row_groups(path: Path) -> Iterator[tuple[int, int, int]]:
    """Consecutive row groups of about one piece each: first, end, bytes on the disk."""
    start = size = 0
    groups = row_group_bytes(path)
    unpacked = sum(groups) or 1
    on_disk = path.stat().st_size
    for number, group in enumerate(groups, start=1):
        size += group
        if size >= _SMALL_PIECE or number == len(groups):
            yield start, number, on_disk * size // unpacked
            start, size = number, 0
