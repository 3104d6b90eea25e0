"""Which part of our weights is which part of another format's: pairs of boxes, and the few ways to make them.

A map between two formats is a list of `Block`s. Each says that a box of one of our tensors holds the same numbers as a
box of one of theirs, perhaps transposed or scaled. Nothing in it has a direction: read from left to right it exports,
from right to left it imports, and cut down to a rank's slice it says which bytes of which file the rank needs.

Our tensors have the names and whole shapes of a checkpoint (`decoder.layers.3.mlp.linear_fc1.weight`), layers always
counted from 0 in the name, whether or not the checkpoint stacks them.

Shape legend: H = hidden size, F = width of an MLP, E = experts, V = vocabulary, D = head width.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

type Side = Literal["ours", "theirs"]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular part of a tensor."""

    name: str
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def stop(self) -> tuple[int, ...]:
        """Where it ends, along every axis."""
        return tuple(start + size for start, size in zip(self.start, self.size, strict=True))

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.size)

    @property
    def slices(self) -> tuple[slice, ...]:
        """To index the tensor with."""
        return tuple(slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))


@dataclass(frozen=True, slots=True)
class Block:
    """Two boxes of the same numbers: theirs = scale * ours.

    Sizes agree once axes of length 1 in front are left out; with `transposed` the last two axes are swapped. Where one
    side is None, the other's box holds `fill` everywhere, and conversion to the side that has nothing leaves it out.
    With `implied` their files need not hold it.
    """

    ours: Box | None
    theirs: Box | None
    transposed: bool = False
    scale: float = 1.0
    fill: float = 0.0
    implied: bool = False

    def side(self, side: Side) -> Box | None:
        """The box of one side."""
        return self.ours if side == "ours" else self.theirs

    def with_side(self, side: Side, box: Box) -> "Block":
        """The same block with another box on one side."""
        if side == "ours":
            return dataclasses.replace(self, ours=box)
        return dataclasses.replace(self, theirs=box)


def whole(name: str, shape: Sequence[int]) -> Box:
    """A whole tensor."""
    return Box(name, (0,) * len(shape), tuple(shape))


def rename(
    ours: str, theirs: str, shape: Sequence[int], *, transposed: bool = False, scale: float = 1.0
) -> list[Block]:
    """A tensor under another name. `shape` is ours."""
    turned = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    return [Block(whole(ours, shape), whole(theirs, turned), transposed, scale)]


def split_rows(ours: str, theirs: Sequence[str], rows: Sequence[int], rest: Sequence[int] = ()) -> list[Block]:
    """One tensor of ours is several of theirs, one below the other: the gate and the value of SwiGLU.

    Args:
        ours: its name; [sum of rows, *rest].
        theirs: their names in order; [rows, *rest] each.
        rows: of each.
        rest: the other axes; none for a bias.
    """
    blocks, begin = [], 0
    for name, count in zip(theirs, rows, strict=True):
        box = Box(ours, (begin, *(0 for _ in rest)), (count, *rest))
        blocks.append(Block(box, whole(name, (count, *rest))))
        begin += count
    return blocks


def split_qkv(
    ours: str, theirs: tuple[str, str, str], groups: int, per_group: int, head_dim: int, rest: Sequence[int] = ()
) -> list[Block]:
    """megatron-core's fused projection: for every query group its queries, its key, its value, one below the other
    (`transformer/attention.py:SelfAttention.get_query_key_value_tensors`).

    Args:
        ours: [groups * (per_group + 2) * D, *rest].
        theirs: query [groups * per_group * D, *rest], key and value [groups * D, *rest].
        groups: key/value heads.
        per_group: query heads for each of them.
        head_dim: D.
        rest: (H,) for weights, () for biases.
    """
    zeros, blocks = tuple(0 for _ in rest), []
    for group in range(groups):
        begin = group * (per_group + 2) * head_dim
        for name, heads, offset in zip(theirs, (per_group, 1, 1), (0, per_group, per_group + 1), strict=True):
            size = (heads * head_dim, *rest)
            source = Box(ours, (begin + offset * head_dim, *zeros), size)
            blocks.append(Block(source, Box(name, (group * heads * head_dim, *zeros), size)))
    return blocks


def cut_rows(ours: str, theirs: str, padded: int, kept: int, rest: Sequence[int]) -> list[Block]:
    """A table whose last rows only pad it on our side: they are left out of theirs, and zero when they come back."""
    zeros = tuple(0 for _ in rest)
    blocks = [Block(Box(ours, (0, *zeros), (kept, *rest)), whole(theirs, (kept, *rest)))]
    if padded > kept:
        blocks.append(Block(Box(ours, (kept, *zeros), (padded - kept, *rest)), None))
    return blocks


def only_theirs(name: str, shape: Sequence[int], fill: float = 0.0, *, implied: bool = False) -> list[Block]:
    """A tensor that only their class has, and that must hold one number everywhere for the models to be the same.

    `implied`: their files may leave it out, which means the same.
    """
    return [Block(None, whole(name, shape), fill=fill, implied=implied)]


def only_ours(name: str, shape: Sequence[int], fill: float = 0.0) -> list[Block]:
    """A tensor that only our model has: filled on import; export must have made sure that it may be left out."""
    return [Block(whole(name, shape), None, fill=fill)]


def place(blocks: Iterable[Block], side: Side, name: str, *index: int) -> list[Block]:
    """The same blocks, with one side's tensors moved into a larger one: `name[index]`.

    The tensors of that side must have one name; experts of a list become rows of a stack.
    """
    moved = []
    for block in blocks:
        box = block.side(side)
        if box is not None:
            box = Box(name, (*index, *box.start), ((1,) * len(index)) + box.size)
            block = block.with_side(side, box)
        moved.append(block)
    return moved


def shift(blocks: Iterable[Block], side: Side, name: str, axis: int, offset: int) -> list[Block]:
    """The same blocks, with one side's boxes moved along an axis, into the tensor `name`: parts of a fused tensor."""
    moved = []
    for block in blocks:
        box = block.side(side)
        if box is not None:
            start = list(box.start)
            start[axis] += offset
            block = block.with_side(side, Box(name, tuple(start), box.size))
        moved.append(block)
    return moved


def turned(blocks: Iterable[Block]) -> list[Block]:
    """The same blocks with their tensors, all matrices, lying the other way round."""
    result = []
    for block in blocks:
        box = block.theirs
        if box is not None:
            box = Box(box.name, box.start[::-1], box.size[::-1])
        result.append(dataclasses.replace(block, theirs=box, transposed=not block.transposed))
    return result


def scaled(blocks: Iterable[Block], factor: float) -> list[Block]:
    """The same blocks with theirs `factor` times as large."""
    return [dataclasses.replace(block, scale=block.scale * factor) for block in blocks]
