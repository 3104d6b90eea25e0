"""Tensors in memory as the source of a conversion."""

from collections.abc import Mapping

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
