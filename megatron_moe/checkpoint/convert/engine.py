"""Puts any part of a tensor together from the other side of a map.

The whole of a conversion stands on `assemble`: a converter asks for whole tensors, a rank that loads another format
asks for the slices it holds, and both read only the bytes that those are made of.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Block, Box, Side
from megatron_moe.checkpoint.convert.ranges import split
from megatron_moe.checkpoint.convert.tensors import TensorInfo, TensorSource
from megatron_moe.config.base import UserError

_CHECKED_AT_ONCE = 8 << 20


@runtime_checkable
class ReadsInto(Protocol):
    """A source that can read without a copy."""

    def read_into(self, box: Box, out: Tensor) -> None:
        """Read into contiguous memory of the box's size and the tensor's dtype."""


def other(side: Side) -> Side:
    """The side across."""
    return "theirs" if side == "ours" else "ours"


class Targets:
    """The blocks of a map by the tensor of one side that they fill; finds those that touch a box."""

    def __init__(self, blocks: Iterable[Block], side: Side) -> None:
        self.side: Side = side
        self._of: dict[str, list[Block]] = defaultdict(list)
        for block in blocks:
            if (box := block.side(side)) is not None:
                self._of[box.name].append(block)
        self._bounds: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, object]:
        """Without what is made when needed."""
        return {**vars(self), "_bounds": {}}

    def __iter__(self) -> Iterator[str]:
        """Names of the tensors."""
        return iter(self._of)

    def touching(self, box: Box) -> list[Block]:
        """The blocks that a part of a tensor is made of."""
        blocks = self._of.get(box.name, [])
        if len(blocks) < 8:
            return blocks
        if box.name not in self._bounds:
            boxes = [block.side(self.side) for block in blocks]
            self._bounds[box.name] = (
                np.array([found.start for found in boxes if found]),
                np.array([found.stop for found in boxes if found]),
            )
        starts, stops = self._bounds[box.name]
        hit = ((starts < np.array(box.stop)) & (stops > np.array(box.start))).all(axis=1)
        return [blocks[index] for index in np.flatnonzero(hit)]


def assemble(
    targets: Targets, box: Box, source: TensorSource, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """A part of a tensor of the targets' side, made from the other side's source.

    Args:
        targets: the map.
        box: which part.
        source: of the other side.
        dtype: of the result; None takes that of the source, which must then be one.
        out: contiguous memory of the box's size and of `dtype`, or None for new.

    Raises:
        UserError: the source is damaged, or its numbers do not fit into `dtype`.
    """
    blocks = targets.touching(box)
    if dtype is None:
        dtype = out.dtype if out is not None else _dtype(box.name, blocks, targets.side, source.infos)
    if out is None:
        out = torch.empty(box.size, dtype=dtype)
    assert out.is_contiguous()
    assert (out.dtype, tuple(out.shape)) == (dtype, box.size)
    filled = sum(_fill(block, targets.side, box, source, out) for block in blocks)
    if filled != box.numel:
        raise ValueError(f"{box}: the map covers {filled} of its {box.numel} numbers")
    return out


def _fill(block: Block, side: Side, box: Box, source: TensorSource, out: Tensor) -> int:
    """Fill what one block knows of the box; returns how many numbers that is."""
    mine, origin = block.side(side), block.side(other(side))
    assert mine is not None
    start = tuple(map(max, mine.start, box.start))
    size = tuple(max(0, end - begin) for begin, end in zip(start, map(min, mine.stop, box.stop), strict=True))
    place = tuple(
        slice(begin - first, begin - first + count) for begin, first, count in zip(start, box.start, size, strict=True)
    )
    view = out[place]
    if not view.numel():
        return 0
    if origin is None:
        view.fill_(block.fill)
        return view.numel()
    part = _across(mine, origin, start, size, transposed=block.transposed)
    plain = not block.transposed and block.scale == 1.0 and source.infos[part.name].dtype == out.dtype
    if plain and view.is_contiguous() and isinstance(source, ReadsInto):
        source.read_into(part, view.view(part.size))
        return view.numel()
    value = source.read(part)
    if block.transposed:
        value = value.transpose(-2, -1)
    if block.scale != 1.0:
        # Half-precision numbers are rounded once, after scaling.
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        value = value * block.scale if side == "theirs" else value / block.scale
    _cast(value.reshape(size), view, part.name)
    return view.numel()


def _across(mine: Box, origin: Box, start: tuple[int, ...], size: tuple[int, ...], *, transposed: bool) -> Box:
    """The part of `origin` that a part of `mine` is made of."""
    depth = min(len(mine.size), len(origin.size))
    cut, extra = len(mine.size) - depth, len(origin.size) - depth
    moved = [first - zero for first, zero in zip(start, mine.start, strict=True)][cut:]
    count = list(size)[cut:]
    if transposed:
        moved[-2:], count[-2:] = moved[:-3:-1], count[:-3:-1]
    begin = [zero + step for zero, step in zip(origin.start[extra:], moved, strict=True)]
    return Box(origin.name, (*origin.start[:extra], *begin), ((1,) * extra) + tuple(count))


def _cast(value: Tensor, view: Tensor, name: str) -> None:
    """Copy into a tensor of another type perhaps, unless that would change what the numbers mean."""
    if value.dtype != view.dtype and value.is_floating_point() != view.is_floating_point():
        raise UserError(f"{name}: is {value.dtype}, which cannot become {view.dtype}")
    view.copy_(value)
    if value.dtype == view.dtype:
        return
    if not value.is_floating_point() and not torch.equal(view.to(value.dtype), value):
        raise UserError(f"{name}: holds numbers that do not fit into {view.dtype}")
    if view.dtype == torch.float16 and bool((view.isinf() & ~value.isinf()).any()):
        raise UserError(f"{name}: holds numbers too large for fp16; choose bf16 or fp32")


def target_infos(
    blocks: Iterable[Block],
    side: Side,
    infos: Mapping[str, TensorInfo],
    dtype: torch.dtype | None = None,
    fp32_names: Collection[str] = (),
) -> dict[str, TensorInfo]:
    """Shapes and dtypes of one side's tensors, in the order of the map.

    Args:
        blocks: the map.
        side: whose tensors.
        infos: of the other side's tensors.
        dtype: of all that are floating-point; None leaves each as it is.
        fp32_names: tensors that are fp32 whatever the others are.

    Raises:
        UserError: a tensor of the other side is missing, or one would be made of parts of different dtypes.
    """
    of_target: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        if (box := block.side(side)) is not None:
            of_target[box.name].append(block)
    usual: Counter[torch.dtype] = Counter()
    for info in infos.values():
        if info.dtype.is_floating_point:
            usual[info.dtype] += info.nbytes
    result = {}
    for name, parts in of_target.items():
        boxes = [box for block in parts if (box := block.side(side)) is not None]
        shape = tuple(map(max, zip(*(box.stop for box in boxes), strict=True)))
        if all(block.side(other(side)) is None for block in parts):
            found = dtype or (usual.most_common(1)[0][0] if usual else torch.float32)
        elif name in fp32_names:
            found = torch.float32
        else:
            found = _dtype(name, parts, side, infos, dtype)
        result[name] = TensorInfo(shape, torch.float32 if name in fp32_names else found)
    return result


def _dtype(
    name: str, blocks: Iterable[Block], side: Side, infos: Mapping[str, TensorInfo], wanted: torch.dtype | None = None
) -> torch.dtype:
    found: dict[torch.dtype, str] = {}
    for block in blocks:
        if (origin := block.side(other(side))) is not None:
            if origin.name not in infos:
                raise UserError(f"{origin.name}: is missing; {name} is made of it")
            found[infos[origin.name].dtype] = origin.name
    floats = all(dtype.is_floating_point for dtype in found)
    if found and floats and wanted is not None:
        return wanted
    if len(found) != 1:
        parts = ", ".join(f"{origin} is {dtype}" for dtype, origin in found.items()) or "nothing in the source"
        raise UserError(f"{name}: is made of parts of different dtypes ({parts}); give a --dtype")
    return next(iter(found))


def check_fills(blocks: Iterable[Block], source: TensorSource) -> None:
    """Before their tensors become ours: what our model has no place for must hold the number that makes it do nothing.

    Raises:
        UserError: it holds another one.
    """
    for block in blocks:
        box = block.theirs
        if box is None or block.ours is not None:
            continue
        for start, size in split(box.size, _CHECKED_AT_ONCE):
            begin = tuple(first + step for first, step in zip(box.start, start, strict=True))
            values = source.read(Box(box.name, begin, size))
            wrong = values != torch.tensor(block.fill, dtype=values.dtype)
            if bool(wrong.any()):
                raise UserError(
                    f"{box.name}: holds {values[wrong][0].item():g}; our model has no such tensor and computes as if "
                    f"it were {block.fill:g} everywhere, so this checkpoint cannot be taken over exactly"
                )
