"""Reads any box of a tensor that `torch.save` wrote straight to where it belongs, without reading the rest.

`torch.save` keeps a tensor's numbers uncompressed at one place of a zip archive. The archive's table of contents and
its pickle are checked as in `safe_archive.py`, then only the bytes that are asked for are read: into the target's own
memory where that is possible, else through a buffer of a few MiB. No second copy of a tensor is ever made.

Checksums: what is read is summed up on the way (`checksums.py`); `Reading.remainder` of the boxes that cover a tensor
together give the checksum of it, which the archive holds.
"""

import itertools
import math
import os
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.checksums import checksum, followed_by_zeros, gap, remainder
from megatron_moe.checkpoint.safe_archive import FileSlice, checked_archive, damage_of
from megatron_moe.checkpoint.safe_pickle import Persistent, Record, Reference
from megatron_moe.config.base import UserError

# Small enough to be summed up while it is in the processor's cache.
_PIECE = 1024 * 1024
_BUFFER = 4 * 1024 * 1024
# Of what stands in an archive beside the pickle and the numbers.
_LARGEST_NOTE = 64 * 1024
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's numbers lie, row by row and nothing between them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Byte of the file at which they begin."""
    crc: int
    """Their checksum."""
    source: str
    """Names the place in errors."""

    @property
    def nbytes(self) -> int:
        """Bytes they take."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(slots=True)
class Reading:
    """What has been read of a tensor so far."""

    nbytes: int = 0
    remainder: int = 0
    """Of the whole tensor, with zeros where nothing was read."""


def find_tensor(part: FileSlice, source: str) -> StoredTensor | None:
    """Where the tensor of an archive lies; None if it is stored in some other way, which `load_archive` may know.

    Args:
        part: the archive, in its file.
        source: names it in errors.

    Raises:
        UserError: the archive is damaged, or holds what no checkpoint needs.
    """
    archive, content = checked_archive(part, source)
    found = _plain_tensor(content)
    if found is None or sys.byteorder != "little":
        return None
    dtype, shape, key, count = found
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    entry = entries.get(f"data/{key}")
    if entry is None or entry.file_size != count * dtype.itemsize:
        raise UserError(f"{source}: damaged (its numbers are not {count} of {dtype})")
    others = {name: other for name, other in entries.items() if other is not entry}
    if any(other.file_size > _LARGEST_NOTE for other in others.values()):
        return None
    with damage_of(source):
        # Reading compares their checksums.
        notes = {name: archive.read(other) for name, other in others.items()}
        part.seek(entry.header_offset)
        mark, name_length, extra_length = _LOCAL_HEADER.unpack(part.read(_LOCAL_HEADER.size).ljust(_LOCAL_HEADER.size))
    if notes.get("byteorder", b"little") != b"little":
        return None
    begin = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
    if mark != b"PK\x03\x04" or begin + entry.file_size > part.length:
        raise UserError(f"{source}: damaged (its numbers do not lie where its table of contents says)")
    return StoredTensor(dtype, shape, part.offset + begin, entry.CRC, source)


def read_box(file: int, stored: StoredTensor, start: Sequence[int], target: Tensor) -> Reading:
    """Read the box of `target`'s shape that begins at `start` into it; its dtype and device may be others.

    Args:
        file: descriptor of the open file.
        stored: what lies there.
        start: of the box, along every axis.
        target: a tensor of as many axes, which may be a view with strides.

    Raises:
        UserError: the file has become shorter.
    """
    reading = Reading()
    if target.numel():
        _read(file, stored, tuple(start), target, reading)
    return reading


def check_whole(file: int, stored: StoredTensor) -> None:
    """Read a tensor and forget it: is it what was written?

    Raises:
        UserError: it is not.
    """
    value, buffer = 0, memoryview(bytearray(min(_PIECE, max(1, stored.nbytes))))
    for begin in range(0, stored.nbytes, _PIECE):
        piece = buffer[: min(_PIECE, stored.nbytes - begin)]
        _fill(file, stored, begin, piece)
        value = remainder(piece, value)
    check_remainder(stored, value)


def check_remainder(stored: StoredTensor, value: int) -> None:
    """Compare the remainder of all of a tensor with its checksum.

    Raises:
        UserError: it is damaged.
    """
    if checksum([value], stored.nbytes) != stored.crc:
        raise UserError(f"{stored.source}: damaged (its checksum differs)")


def _plain_tensor(content: Any) -> tuple[torch.dtype, tuple[int, ...], str, int] | None:
    """dtype, shape, name of the storage and its length, of a pickled tensor that fills its storage row by row."""
    if not isinstance(content, Record) or str(content.made_by) != "torch._utils._rebuild_tensor_v2":
        return None
    args: Any = content.args
    if len(args) != 6 or not isinstance(args[0], Persistent) or not isinstance(args[0].id, tuple):
        return None
    storage, offset, shape, strides = args[:4]
    words = storage.id
    if len(words) != 5 or words[0] != "storage" or not isinstance(words[1], Reference) or not isinstance(words[2], str):
        return None
    dtype, count = _DTYPES.get(words[1].name), words[4]
    sizes = (shape, strides)
    if dtype is None or any(not isinstance(size, tuple) or not all(type(n) is int for n in size) for size in sizes):
        return None
    expected, step = [], 1
    for length in reversed(shape):
        expected.append(step)
        step *= length
    row_by_row = all(
        length == 1 or stride == wanted
        for length, stride, wanted in zip(shape, strides, reversed(expected), strict=False)
    )
    if len(shape) != len(strides) or min(shape, default=1) < 1 or not row_by_row or offset != 0 or count != step:
        return None
    return dtype, shape, words[2], count


def _read(file: int, stored: StoredTensor, start: tuple[int, ...], target: Tensor, reading: Reading) -> None:
    memory = _memory(target) if target.dtype == stored.dtype else None
    if memory is not None:
        _read_runs(file, stored, start, target.shape, memory, reading)
        return
    if target.numel() * stored.dtype.itemsize <= _BUFFER or target.numel() == 1:
        buffer = torch.empty(target.shape, dtype=stored.dtype)
        _read_runs(file, stored, start, target.shape, _memory(buffer), reading)
        target.copy_(buffer)
        return
    # In slabs along the first axis that can be cut.
    axis = next(index for index, length in enumerate(target.shape) if length > 1)
    each = max(1, target.shape[axis] * _BUFFER // (target.numel() * stored.dtype.itemsize))
    for begin in range(0, target.shape[axis], each):
        slab = target.narrow(axis, begin, min(each, target.shape[axis] - begin))
        place = (*start[:axis], start[axis] + begin, *start[axis + 1 :])
        _read(file, stored, place, slab, reading)


def _memory(target: Tensor) -> Any:
    """A tensor's bytes as an array of its shape, if they can be written to from here; the last axis in bytes."""
    if target.device.type != "cpu" or target.layout != torch.strided or type(target) is not Tensor:
        return None
    if target.ndim == 0:
        target = target.view(1)
    if target.shape[-1] != 1 and target.stride(-1) != 1:
        return None
    # torch refuses to view as bytes what has a stride on an axis of length 1.
    target = target if target.stride(-1) == 1 else target.as_strided(target.shape, (*target.stride()[:-1], 1))
    return target.view(torch.uint8).numpy()


def _read_runs(
    file: int, stored: StoredTensor, start: tuple[int, ...], size: Sequence[int], memory: Any, reading: Reading
) -> None:
    """Read a box into an array of bytes: runs of what is contiguous on both sides, in the order of the file."""
    shape, item = stored.shape, stored.dtype.itemsize
    inner = len(shape)
    # Axes from `inner` on are one run in the file, and in memory.
    while inner and (inner == len(shape) or size[inner] == shape[inner]) and _is_one(memory, inner - 1, item):
        inner -= 1
    strides = [math.prod(shape[axis + 1 :]) * item for axis in range(len(shape))]
    first = sum(place * stride for place, stride in zip(start, strides, strict=True))
    run = math.prod(size[inner:]) * item
    value, position = 0, 0
    for index in itertools.product(*map(range, size[:inner])):
        offset = first + sum(place * stride for place, stride in zip(index, strides, strict=False))
        if value:
            value = gap(offset - position)(value)
        # No axis of length 0 is left, so the bytes are one piece.
        view = memoryview(memory[index]).cast("B")
        for begin in range(0, run, _PIECE):
            piece = view[begin : begin + _PIECE]
            _fill(file, stored, offset + begin, piece)
            value = remainder(piece, value)
        position = offset + run
    reading.nbytes += run * math.prod(size[:inner])
    reading.remainder ^= followed_by_zeros(value, stored.nbytes - position)


def _is_one(memory: Any, axis: int, item: int) -> bool:
    """Whether an array's axes from `axis` on lie in memory without holes."""
    return bool(memory[(0,) * axis].flags.c_contiguous) if axis < memory.ndim else True


def _fill(file: int, stored: StoredTensor, offset: int, target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = os.preadv(file, [target[done:]], stored.begin + offset + done)
        if count == 0:
            raise UserError(f"{stored.source}: cut short while it was read")
        done += count
