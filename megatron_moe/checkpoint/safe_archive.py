"""Loads what `torch.save` wrote, after checking that the archive holds no more than plain tensors and values.

`torch.load(weights_only=True)` runs no code of a file, but it believes what the file announces: a zip bomb, or the
call `bytearray(10**12)`, costs all memory. So the archive's table of contents and its pickle are checked before, and
the checksum of every storage.
"""

import contextlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from megatron_moe.checkpoint.safe_pickle import read_pickle
from megatron_moe.config.base import UserError

_DAMAGE = (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError)
_DTYPES = [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
# What a pickled tensor or generator state is made of.
_TENSOR_PARTS = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch.storage.UntypedStorage",
        "collections.OrderedDict",
        *(f"torch.{name}" for name in vars(torch) if name.endswith("Storage")),
        *(f"torch.{name}" for name in _DTYPES),
    }
)


class FileSlice(io.RawIOBase):
    """A part of a file as a file; reading takes no more memory than the part is long, whatever is asked for."""

    def __init__(self, stream: BinaryIO, offset: int, length: int) -> None:
        super().__init__()
        self.offset, self.length = offset, length
        self._stream, self._position = stream, 0

    def fileno(self) -> int:
        """Descriptor of the file, of which this is only a part."""
        return self._stream.fileno()

    @property
    def path(self) -> Path:
        """Of the file."""
        return Path(self._stream.name)

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Position within the part."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move within the part."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.length}[whence]
        if start + offset < 0:
            raise OSError("seek before the start")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes."""
        left = max(0, self.length - self._position)
        self._stream.seek(self.offset + self._position)
        data = self._stream.read(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the part goes."""
        left = max(0, self.length - self._position)
        self._stream.seek(self.offset + self._position)
        count: int = self._stream.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]
        self._position += count
        return count


def load_archive(part: FileSlice | io.BytesIO, source: str) -> Any:
    """What a part of a checkpoint's data file holds: tensors, numbers, text, and lists and dicts of them.

    Raises:
        UserError: it holds anything else, or is damaged.
    """
    archive, _ = checked_archive(part, source)
    with damage_of(source):
        # torch writes checksums and does not look at them: a flipped bit would become a weight.
        if (wrong := archive.testzip()) is not None:
            raise UserError(f"{source}: damaged (checksum of {wrong} differs)")
    part.seek(0)
    try:
        return torch.load(cast(BinaryIO, part), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{source}: damaged ({reason})") from error


def checked_archive(part: FileSlice | io.BytesIO, source: str) -> tuple[zipfile.ZipFile, Any]:
    """An archive whose table of contents is sound, and what its pickle describes; checksums are not looked at, but
    the pickle's.

    Raises:
        UserError: it is damaged, or its pickle refers to what no checkpoint needs.
    """
    with damage_of(source):
        # It closes nothing: the file is somebody else's.
        archive = zipfile.ZipFile(part)
        # torch stores without compression, so nothing can be larger than the file.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise UserError(f"{source}: holds compressed data, which no checkpoint of this program does")
        if any(entry.file_size != entry.compress_size for entry in archive.infolist()):
            raise UserError(f"{source}: damaged (sizes in its table of contents differ)")
        pickles = [name for name in archive.namelist() if Path(name).name == "data.pkl"]
        if len(pickles) != 1:
            raise UserError(f"{source}: damaged (no data.pkl in it)")
        content = archive.read(pickles[0])
    return archive, read_pickle(content, _TENSOR_PARTS, source)


@contextlib.contextmanager
def damage_of(source: str) -> Iterator[None]:
    """Makes one line of what zipfile says of a damaged archive."""
    try:
        yield
    except _DAMAGE as error:
        raise UserError(f"{source}: damaged ({str(error)[:120]})") from error
