"""Tensors in memory as the source of a conversion."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Box
from megatron_moe.checkpoint.convert.tensors import TensorInfo


class MemorySource:
    """A `TensorSource` of tensors that are in memory; counts the numbers that are read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        self.numbers_read = 0

    def read(self, box: Box) -> Tensor:
        """A copy of a part."""
        assert all(stop <= length for stop, length in zip(box.stop, self.infos[box.name].shape, strict=True))
        assert min(box.start, default=0) >= 0
        self.numbers_read += box.numel
        return self.tensors[box.name][box.slices].clone(memory_format=torch.contiguous_format)


class SlowSource(MemorySource):
    """Takes a moment for each read, so that a test can interrupt it; takes note of its processes in a file."""

    def __init__(self, tensors: Mapping[str, Tensor], seconds: float, note: Path) -> None:
        super().__init__(tensors)
        self._seconds, self._note = seconds, note

    def read(self, box: Box) -> Tensor:
        """A copy of a part, after a while."""
        with self._note.open("a", encoding="utf-8") as stream:
            stream.write(f"{os.getpid()} {box.name}\n")
        time.sleep(self._seconds)
        return super().read(box)


class DyingSource(MemorySource):
    """Kills the process that reads one of its tensors, as the system does where memory is short."""

    def __init__(self, tensors: Mapping[str, Tensor], deadly: str) -> None:
        super().__init__(tensors)
        self._deadly = deadly

    def read(self, box: Box) -> Tensor:
        """A copy of a part, or nothing any more."""
        if box.name == self._deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(box)
