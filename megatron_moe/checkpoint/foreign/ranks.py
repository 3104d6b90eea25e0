"""Tensors that tensor-parallel ranks wrote into files of their own, put together when they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Box
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.foreign.model import check_finite
from megatron_moe.checkpoint.foreign.torch_file import StoredTensor
from megatron_moe.config.base import UserError


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor of which every rank holds a part along an axis, or a copy."""

    pieces: tuple[StoredTensor, ...]
    axis: int | None
    """None: copies, which must be equal."""

    @property
    def info(self) -> TensorInfo:
        """Shape and type of the whole."""
        shape = list(self.pieces[0].shape)
        if self.axis is not None:
            shape[self.axis] = sum(piece.shape[self.axis] for piece in self.pieces)
        return TensorInfo(tuple(shape), self.pieces[0].dtype)


def join(name: str, pieces: Sequence[StoredTensor], axis: int | None) -> Joined:
    """A tensor of its ranks' parts.

    Raises:
        UserError: the parts do not fit each other.
    """
    first = pieces[0]
    for piece in pieces[1:]:
        same = [length for place, length in enumerate(piece.shape) if place != axis]
        expected = [length for place, length in enumerate(first.shape) if place != axis]
        if same != expected or piece.dtype != first.dtype or len(piece.shape) != len(first.shape):
            raise UserError(
                f"{piece.storage.path}: {name} is {_text(piece)}, but {_text(first)} in {first.storage.path.name}; "
                "the files are not of one checkpoint"
            )
    return Joined(tuple(pieces), axis)


class RankedSource:
    """A `TensorSource` of joined tensors."""

    def __init__(self, tensors: Mapping[str, Joined]) -> None:
        self._tensors = dict(tensors)
        self._infos = {name: joined.info for name, joined in self._tensors.items()}
        self._verified: set[tuple[Path, int]] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"_tensors": self._tensors, "_infos": self._infos, "_verified": set()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""
        return self._infos

    def read(self, box: Box) -> Tensor:
        """A part of a tensor: of the ranks that have some of it.

        Raises:
            UserError: a file is damaged or has gone, copies differ, or a weight is not finite.
        """
        joined = self._tensors[box.name]
        tensor = self._copy(joined, box) if joined.axis is None else self._parts(joined, joined.axis, box)
        check_finite(tensor, box.name, joined.pieces[0].storage.path)
        return tensor

    def _parts(self, joined: Joined, axis: int, box: Box) -> Tensor:
        parts, begin = [], 0
        for piece in joined.pieces:
            end = begin + piece.shape[axis]
            low, high = max(begin, box.start[axis]), min(end, box.stop[axis])
            if low < high:
                start, size = list(box.start), list(box.size)
                start[axis], size[axis] = low - begin, high - low
                parts.append(piece.read(start, size, self._verified))
            begin = end
        if not parts:
            return torch.empty(box.size, dtype=joined.pieces[0].dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def _copy(self, joined: Joined, box: Box) -> Tensor:
        first, *others = joined.pieces
        tensor = first.read(box.start, box.size, self._verified)
        for piece in others:
            other = piece.read(box.start, box.size, self._verified)
            if not torch.equal(tensor, other):
                most = (tensor.double() - other.double()).abs().max().item()
                raise UserError(
                    f"{piece.storage.path}: {box.name} differs from its copy in {first.storage.path.name} by up to "
                    f"{most:.2g}; the ranks had drifted apart, or the files are not of one checkpoint"
                )
        return tensor


def _text(piece: StoredTensor) -> str:
    return f"{tuple(piece.shape)} {str(piece.dtype).removeprefix('torch.')}"
