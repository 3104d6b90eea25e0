"""Whether a foreign checkpoint holds the tensors that its flags call for, no fewer and no others."""

from collections.abc import Iterable, Mapping

from megatron_moe.checkpoint.convert.blocks import Block
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.config.base import UserError


def check_shapes(blocks: Iterable[Block], infos: Mapping[str, TensorInfo], source: str) -> None:
    """Hold the map against the tensors.

    Raises:
        UserError: names the first tensor that is missing, left over or of another shape.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for block in blocks:
        if (box := block.theirs) is not None:
            known = expected.get(box.name, (0,) * len(box.size))
            expected[box.name] = tuple(map(max, known, box.stop))
    for name, shape in expected.items():
        if name not in infos:
            raise UserError(f"{source}: lacks {name}, of shape {shape}, which its flags call for")
        if infos[name].shape != shape:
            raise UserError(f"{source}: {name} has the shape {infos[name].shape}, but its flags call for {shape}")
    if left := sorted(set(infos) - set(expected)):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UserError(f"{source}: holds {left[0]}{more}, which its flags have no place for")
