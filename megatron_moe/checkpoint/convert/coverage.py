"""Holds a map against the tensors of both sides: none missing or unknown, and every number covered exactly once.

What is not covered would be left as memory was, and what is covered twice would be whichever came last, so a conversion
begins with this.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from megatron_moe.checkpoint.convert.blocks import Block, Box, Side
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.config.base import UserError

type Shapes = Mapping[str, TensorInfo] | Mapping[str, Sequence[int]]


def check_coverage(
    blocks: Sequence[Block], ours: Shapes, theirs: Shapes, ours_in: str = "our model", theirs_in: str = "their files"
) -> None:
    """See the module's text.

    Args:
        blocks: the map.
        ours: our tensors.
        theirs: theirs.
        ours_in: what the messages call the place of our tensors: a folder.
        theirs_in: that of theirs.

    Raises:
        UserError: the tensor, and what is wrong with it.
    """
    for block in blocks:
        _check_sizes(block)
    check_side(blocks, "ours", ours, ours_in)
    check_side(blocks, "theirs", theirs, theirs_in)


def check_side(blocks: Iterable[Block], side: Side, infos: Shapes, where: str) -> None:
    """`check_coverage` of one side.

    Raises:
        UserError: the tensor, and what is wrong with it.
    """
    boxes: dict[str, list[Box]] = defaultdict(list)
    for block in blocks:
        if (box := block.side(side)) is not None:
            boxes[box.name].append(box)
    shapes = {name: tuple(info.shape if isinstance(info, TensorInfo) else info) for name, info in infos.items()}
    if missing := [name for name in boxes if name not in shapes]:
        raise UserError(f"{where}: lacks {missing[0]}{_more(missing)}, which a model of this configuration has")
    if unknown := [name for name in shapes if name not in boxes]:
        raise UserError(f"{where}: holds {unknown[0]}{_more(unknown)}, which no model of this configuration has")
    for name, found in boxes.items():
        _check_tensor(name, found, shapes[name], where)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _check_tensor(name: str, boxes: list[Box], shape: tuple[int, ...], where: str) -> None:
    expected = tuple(max(column) for column in zip(*(box.stop for box in boxes), strict=False))
    if any(len(box.size) != len(shape) for box in boxes) or expected != shape:
        raise UserError(f"{where}: {name} has the shape {list(shape)}; this configuration needs {list(expected)}")
    if len(boxes) == 1 and boxes[0].size == shape:
        return
    starts, stops = np.array([box.start for box in boxes]), np.array([box.stop for box in boxes])
    if (starts < 0).any() or (stops < starts).any():
        raise ValueError(f"{name}: the map has a box with a negative start or size")
    if not shape:
        raise UserError(f"{name}: the map covers it {len(boxes)} times")
    # Only the bounds of boxes matter: between two neighbouring ones all numbers are covered equally often.
    bounds = [
        np.unique(np.concatenate((starts[:, axis], stops[:, axis], [0, length]))) for axis, length in enumerate(shape)
    ]
    counts = np.zeros([len(values) for values in bounds], dtype=np.int64)
    low = [np.searchsorted(values, starts[:, axis]) for axis, values in enumerate(bounds)]
    high = [np.searchsorted(values, stops[:, axis]) for axis, values in enumerate(bounds)]
    for corner in itertools.product((0, 1), repeat=len(shape)):
        place = tuple(high[axis] if end else low[axis] for axis, end in enumerate(corner))
        np.add.at(counts, place, -1 if sum(corner) % 2 else 1)
    for axis in range(len(shape)):
        counts = np.cumsum(counts, axis=axis)
    cells = counts[tuple(slice(-1) for _ in shape)]
    wrong = np.argwhere(cells != 1)
    if len(wrong):
        cell = tuple(wrong[0])
        spans = ", ".join(f"{values[index]}:{values[index + 1]}" for values, index in zip(bounds, cell, strict=True))
        problem = "covered by nothing" if cells[cell] == 0 else f"covered {cells[cell]} times"
        raise UserError(f"{name}[{spans}]: is {problem} in the map between the two formats")


def _check_sizes(block: Block) -> None:
    if block.ours is None or block.theirs is None:
        if block.ours is block.theirs:
            raise ValueError(f"{block}: a block of nothing")
        return
    ours, theirs = list(block.ours.size), list(block.theirs.size)
    if block.transposed:
        theirs[-2:] = theirs[:-3:-1]
    depth = min(len(ours), len(theirs))
    extra = ours[: len(ours) - depth] + theirs[: len(theirs) - depth]
    if ours[len(ours) - depth :] != theirs[len(theirs) - depth :] or any(length != 1 for length in extra):
        raise UserError(
            f"{block.ours.name} {ours} and {block.theirs.name} {theirs}: the map says that they are the same"
        )
