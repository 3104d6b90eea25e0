"""Loads what `torch.save` wrote, after checking that the archive holds no more than plain tensors and values.

`torch.load(weights_only=True)` runs no code of a file, but it believes what the file announces: a zip bomb, or the
call `bytearray(10**12)`, costs all memory. So the archive's table of contents and its pickle are checked before, and
the checksum of every storage.
"""

import io
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from megatron_moe.checkpoint.safe_pickle import read_pickle
from megatron_moe.config.base import UserError

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
        self._stream, self._offset, self._length, self._position = stream, offset, length, 0

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
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise OSError("seek before the start")
        self._position = start + offset
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes."""
        left = max(0, self._length - self._position)
        self._stream.seek(self._offset + self._position)
        data = self._stream.read(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the part goes."""
        left = max(0, self._length - self._position)
        self._stream.seek(self._offset + self._position)
        count: int = self._stream.readinto(memoryview(buffer)[:left])  # type: ignore[attr-defined]
        self._position += count
        return count


def load_archive(part: FileSlice | io.BytesIO, source: str) -> Any:
    """What a part of a checkpoint's data file holds: tensors, numbers, text, and lists and dicts of them.

    Raises:
        UserError: it holds anything else, or is damaged.
    """
    _check(part, source)
    part.seek(0)
    try:
        return torch.load(cast(BinaryIO, part), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"{source}: damaged ({reason})") from error


def _check(part: FileSlice | io.BytesIO, source: str) -> None:
    try:
        with zipfile.ZipFile(part) as archive:
            # torch stores without compression, so nothing can be larger than the file.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(f"{source}: holds compressed data, which no checkpoint of this program does")
            if any(entry.file_size != entry.compress_size for entry in archive.infolist()):
                raise UserError(f"{source}: damaged (sizes in its table of contents differ)")
            pickles = [name for name in archive.namelist() if Path(name).name == "data.pkl"]
            if len(pickles) != 1:
                raise UserError(f"{source}: damaged (no data.pkl in it)")
            # torch writes checksums and does not look at them: a flipped bit would become a weight.
            if (wrong := archive.testzip()) is not None:
                raise UserError(f"{source}: damaged (checksum of {wrong} differs)")
            content = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{source}: damaged ({str(error)[:120]})") from error
    read_pickle(content, _TENSOR_PARTS, source)
