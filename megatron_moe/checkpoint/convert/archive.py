"""Writes one tensor as `torch.save` would, at a place in a file that is known before.

torch can save to a stream only, and whole files of a checkpoint are too large to wait for: here the length of an
archive follows from shape and dtype, so several processes can write their parts of one file at the same time.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Buffer
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.ranges import WRITE_BYTES, Files, as_bytes, write_run
from megatron_moe.checkpoint.convert.tensors import TensorInfo

# torch/csrc: numbers begin at a multiple of this.
_ALIGNMENT = 64
# The classes by which a pickle tells dtypes; to ask them for theirs warns that they are deprecated.
_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.uint8: torch.ByteStorage,
    torch.int8: torch.CharStorage,
    torch.int16: torch.ShortStorage,
    torch.int32: torch.IntStorage,
    torch.int64: torch.LongStorage,
    torch.bool: torch.BoolStorage,
}


class _Storage:
    """Stands for the numbers in the pickle."""

    def __init__(self, info: TensorInfo) -> None:
        self.words = ("storage", _STORAGES[info.dtype], "0", "cpu", math.prod(info.shape))


class _Tensor:
    """Is pickled as a tensor is."""

    def __init__(self, info: TensorInfo) -> None:
        self._info = info

    def __reduce__(self) -> tuple[Any, ...]:
        """`torch._tensor.Tensor._reduce_ex_internal`."""
        strides = tuple(math.prod(self._info.shape[axis + 1 :]) for axis in range(len(self._info.shape)))
        args: tuple[Any, ...] = (_Storage(self._info), 0, self._info.shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, args


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.words if isinstance(obj, _Storage) else None


class _Place(io.RawIOBase):
    """A place in a file, as a file of its own."""

    def __init__(self, files: Files, name: str, offset: int) -> None:
        self._files, self._name, self._offset, self._position = files, name, offset, 0

    def writable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Within the place."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Within the place."""
        assert whence in (io.SEEK_SET, io.SEEK_CUR)
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def write(self, data: Buffer) -> int:
        """All of it."""
        view = memoryview(data)
        write_run(self._files, self._name, self._offset + self._position, view)
        self._position += view.nbytes
        return view.nbytes


@dataclass(frozen=True, slots=True)
class _Layout:
    padding: int
    around: int
    """Bytes that are not numbers."""


def archive_length(info: TensorInfo) -> int:
    """Bytes that `write_archive` writes."""
    return _layout(info).around + info.nbytes


def write_archive(files: Files, name: str, offset: int, info: TensorInfo, values: Tensor) -> None:
    """Write a tensor to a place in a file.

    Args:
        files: where the file is.
        name: of the file, which must be there.
        offset: where in it.
        info: shape and dtype under which the tensor is stored.
        values: contiguous, of that dtype, as many.

    Raises:
        UserError: it cannot be written.
    """
    assert values.dtype == info.dtype
    assert values.numel() == math.prod(info.shape)
    _write(_Place(files, name, offset), info, as_bytes(values), _layout(info).padding)


@lru_cache(4096)
def _layout(info: TensorInfo) -> _Layout:
    """Found by writing the archive without its numbers, which are stored as they are."""
    if info.dtype not in _STORAGES:
        raise ValueError(f"{info.dtype} has no storage in torch")
    first = io.BytesIO()
    begin = _write(first, info, b"", 0)
    padding = -begin % _ALIGNMENT
    padding += _ALIGNMENT if 0 < padding < 4 else 0
    last = io.BytesIO()
    assert _write(last, info, b"", padding) % _ALIGNMENT == 0
    return _Layout(padding, len(last.getvalue()))


def _write(file: Any, info: TensorInfo, data: Buffer, padding: int) -> int:
    """Write the archive; returns where in it the numbers begin."""
    description = io.BytesIO()
    _Pickler(description, protocol=2).dump(_Tensor(info))
    notes = {".format_version": b"1", ".storage_alignment": b"%d" % _ALIGNMENT, "byteorder": b"little"}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry("data.pkl"), description.getvalue())
        for name, content in notes.items():
            archive.writestr(_entry(name), content)
        numbers = _entry("data/0")
        if padding:
            # An extra field: its kind, its length, and as much as it says (torch: "FB" and padding).
            numbers.extra = b"FB" + (padding - 4).to_bytes(2, "little") + bytes(padding - 4)
        with archive.open(numbers, "w") as stream:
            begin: int = file.tell()
            view = memoryview(data)
            # Summed up and written while they are in the processor's cache.
            for first in range(0, len(view), WRITE_BYTES):
                stream.write(view[first : first + WRITE_BYTES])
        archive.writestr(_entry("version"), b"3\n")
    return begin


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}")
