"""Reads a box of a tensor that lies row-major in a file, and writes runs of numbers: the bytes of the box, no more.

Files are read with pread, never mapped: mapped pages would count as this process's memory, and a file cut short by
another process would kill it.
"""

import itertools
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.config.base import UserError, disk_error

# From here on runs are read one by one: with the ranks of a node that each read their columns of a matrix, whole rows
# would be read many times over. Measured on a cached file, reads of 0.9 to 14 KB cost 5 to 40 % more than whole rows.
_LONG_RUN = 1 << 10
_BUFFER = 4 << 20
_MOST_WASTE = 16
# Recent kernels back one large write by large pages, and search for those: measured on ext4 and Linux 6.18, writes of 1
# to 8 MiB cost up to eight times the system time of these.
WRITE_BYTES = 256 << 10


class Files:
    """Files of a folder, opened when first needed; sent to another process, they are opened there anew."""

    def __init__(self, folder: Path, *, writable: bool = False) -> None:
        self.folder, self._writable = folder, writable
        self._open: dict[str, int] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without what only this process can use."""
        return {**vars(self), "_open": {}}

    def __getitem__(self, name: str) -> int:
        """The descriptor of a file.

        Raises:
            UserError: it cannot be opened.
        """
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = os.open(path, (os.O_RDWR if self._writable else os.O_RDONLY) | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{path}: cannot be opened: {error.strerror}") from error
        return self._open[name]

    def close(self) -> None:
        """Close them; they are opened again when needed."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __del__(self) -> None:
        """Close them; at the end of the program the system does."""
        if not sys.is_finalizing():
            self.close()


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def read_run(files: Files, name: str, offset: int, into: memoryview) -> None:
    """Fill `into` from a place in a file.

    Raises:
        UserError: the file ends before, or cannot be read.
    """
    descriptor, done = files[name], 0
    try:
        while done < len(into):
            count = os.preadv(descriptor, [into[done:]], offset + done)
            if not count:
                raise UserError(f"{files.folder / name}: cut short: needs bytes to {offset + len(into)}")
            done += count
    except OSError as error:
        raise UserError(f"{files.folder / name}: cannot be read: {error.strerror}") from error


def write_run(files: Files, name: str, offset: int, data: memoryview | bytes) -> None:
    """Write all of `data` to a place in a file.

    Raises:
        UserError: it cannot be written, as on a full disk.
    """
    descriptor, done, view = files[name], 0, memoryview(data)
    try:
        while done < len(view):
            done += os.pwrite(descriptor, view[done : done + WRITE_BYTES], offset + done)
    except OSError as error:
        raise disk_error(str(files.folder / name), error) from error


def read_box(
    files: Files, name: str, offset: int, shape: Sequence[int], start: Sequence[int], size: Sequence[int], out: Tensor
) -> None:
    """Read a box of a tensor into `out`, which is contiguous, of the tensor's dtype and the box's size.

    Args:
        files: where the file is.
        name: of the file.
        offset: where in it the tensor begins.
        shape: of the tensor.
        start: of the box.
        size: of the box.
        out: takes the numbers.
    """
    if not out.numel():
        return
    width, view = out.element_size(), as_bytes(out)
    axis = _first_of_run(shape, size)
    if axis < 0:
        read_run(files, name, offset, view)
        return
    # Bytes that one step along each axis takes.
    strides = [width * math.prod(shape[i + 1 :]) for i in range(len(shape))]
    begin = offset + sum(first * stride for first, stride in zip(start, strides, strict=True))
    run = size[axis] * strides[axis]
    if axis and run < _LONG_RUN and strides[axis - 1] <= _MOST_WASTE * run:
        _read_rows(files, name, begin, strides, size, axis, view)
        return
    done = 0
    for place in itertools.product(*(range(length) for length in size[:axis])):
        shifted = sum(step * stride for step, stride in zip(place, strides, strict=False))
        read_run(files, name, begin + shifted, view[done : done + run])
        done += run


def _read_rows(
    files: Files, name: str, begin: int, strides: Sequence[int], size: Sequence[int], axis: int, view: memoryview
) -> None:
    """Short runs that lie close together: read with what lies between them, a few MiB at a time."""
    run, stride, rows = size[axis] * strides[axis], strides[axis - 1], size[axis - 1]
    at_once = max(1, min(rows, _BUFFER // stride))
    buffer = torch.empty(at_once * stride, dtype=torch.uint8)
    target = torch.frombuffer(view, dtype=torch.uint8).view(-1, run)
    done = 0
    for place in itertools.product(*(range(length) for length in size[: axis - 1])):
        shifted = begin + sum(step * stride for step, stride in zip(place, strides, strict=False))
        for row in range(0, rows, at_once):
            count = min(at_once, rows - row)
            # The last row ends with its run: what follows may lie behind the end of the file.
            length = (count - 1) * stride + run
            read_run(files, name, shifted + row * stride, as_bytes(buffer)[:length])
            target[done : done + count].copy_(buffer.as_strided((count, run), (stride, 1)))
            done += count


def _first_of_run(shape: Sequence[int], size: Sequence[int]) -> int:
    """The first axis of those whose numbers lie one after the other; -1 where that is the whole tensor."""
    axis = len(shape) - 1
    while axis >= 0 and shape[axis] == size[axis]:
        axis -= 1
    return axis


def split(size: Sequence[int], most: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box into parts of at most `most` numbers that lie one after the other in it: their starts and sizes.

    One number is the least.
    """
    if math.prod(size) <= most:
        return [((0,) * len(size), tuple(size))] if math.prod(size) else []
    # The first axis of which one step is small enough.
    axis = next((axis for axis in range(len(size)) if math.prod(size[axis + 1 :]) <= most), len(size) - 1)
    step = max(1, most // math.prod(size[axis + 1 :]))
    parts = []
    for place in itertools.product(*(range(length) for length in size[:axis])):
        for begin in range(0, size[axis], step):
            start = (*place, begin, *(0 for _ in size[axis + 1 :]))
            parts.append((start, ((1,) * axis) + (min(step, size[axis] - begin), *size[axis + 1 :])))
    return parts


def are_of_size(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Whether all these files are in a folder, each as long as it should be."""
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def interleave[T](lists: Iterable[list[T]]) -> list[T]:
    """One of each list, then the next of each, at the speed at which all end together."""
    placed = [
        ((number + 0.5) / len(items), order, item)
        for order, items in enumerate(lists)
        for number, item in enumerate(items)
    ]
    return [item for *_, item in sorted(placed, key=lambda entry: entry[:2])]
