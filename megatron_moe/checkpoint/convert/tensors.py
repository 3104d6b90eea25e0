"""What a conversion reads from: named tensors of which any part can be read, without loading the rest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Box


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and type of a tensor, without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """A checkpoint of some format, opened. It can be sent to another process, which opens its files anew."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor in it by name."""

    def read(self, box: Box) -> Tensor:
        """A part of a tensor, of the box's size and the tensor's own dtype, in memory of its own.

        Raises:
            UserError: the file is damaged or has gone.
        """
