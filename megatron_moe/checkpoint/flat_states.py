"""Loads into the distributed optimizer, of every tensor of moments and masters, the part that this rank keeps.

The distributed optimizer cuts the parameters of a rank, one behind the other, into equal pieces for its data-parallel
replicas. Upstream asks a checkpoint for every parameter whole, on every replica, and cuts it afterwards
(`optimizer/distrib_optimizer.py:DistributedOptimizer.sharded_param_state_fully_reshardable`): with eight replicas on a
node, eight copies of the optimizer's state. Here a rank asks for its piece: rows and parts of rows, read straight into
the optimizer's tensors.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_moe.runtime.replace import Replacement

type Axes = tuple[int, ...]

_saved_states = DistributedOptimizer.sharded_param_state_fully_reshardable


def sharded_states(
    optimizer: Any, model_sharded: dict[str, Any], is_loading: bool = False, metadata: dict[str, Any] | None = None
) -> dict[int, dict[str, list[ShardedTensor]]]:
    """Upstream's method; what is loaded goes by parameter and kind, in boxes of the checkpoint's tensors."""
    if not is_loading:
        return _saved_states(optimizer, model_sharded, is_loading, metadata)
    sharded = {
        leaf.data: leaf for leaf in nested_values(model_sharded) if isinstance(getattr(leaf, "data", None), Tensor)
    }
    states: dict[int, dict[str, list[ShardedTensor]]] = {}
    for parameter, begin, end in _pieces(optimizer):
        entries = _entries(sharded[parameter])
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        states[len(states)] = {
            kind: [
                box
                for first, entry in entries
                for box in _boxes_of(entry, first, begin, end, f"optimizer.state.{kind}.", tensors[kind])
            ]
            for kind in ("param", *optimizer.optimizer_state_keys)
        }
    return states


def already_there(optimizer: Any, states: dict[int, dict[str, list[Tensor]]]) -> None:
    """In place of upstream's method that copies what was loaded: it was read into the optimizer's own tensors."""
    for (parameter, _, _), kinds in zip(_pieces(optimizer), states.values(), strict=True):
        tensors = optimizer._get_main_param_and_optimizer_states(parameter)
        for kind, boxes in kinds.items():
            home = tensors[kind].untyped_storage().data_ptr()
            assert all(box.untyped_storage().data_ptr() == home for box in boxes), kind
            assert sum(box.numel() for box in boxes) == tensors[kind].numel(), kind


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_REASON = "every data-parallel rank would load the whole state of the optimizer"
REPLACEMENTS = [
    Replacement(_OPTIMIZER, "sharded_param_state_fully_reshardable", sharded_states, _REASON),
    Replacement(_OPTIMIZER, "load_parameter_state_from_fully_reshardable", already_there, _REASON),
]


def _pieces(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Parameters that this rank keeps a piece of, and where in the parameter it begins and ends."""
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _entries(leaf: ShardedTensor | ShardedTensorFactory) -> list[tuple[int, ShardedTensor]]:
    """A parameter's entries in the checkpoint, without data, and at which of its numbers each begins."""
    shapes = replace(leaf, data=torch.empty_like(leaf.data, device="meta"))
    entries = list(nested_values(shapes.build())) if isinstance(shapes, ShardedTensorFactory) else [shapes]
    assert all(entry.data.is_contiguous() for entry in entries), leaf.key
    return [(entry.data.storage_offset(), entry) for entry in entries]


def _boxes_of(
    entry: ShardedTensor, first: int, begin: int, end: int, prefix: str, state: Tensor
) -> Iterator[ShardedTensor]:
    """What lies in the piece from `begin` to `end` of an entry that begins at the number `first` of its parameter."""
    position = max(begin, first)
    for start, size in flat_boxes(
        position - first, min(end, first + math.prod(entry.local_shape)) - first, entry.local_shape
    ):
        ones = (1,) * entry.prepend_axis_num
        count = math.prod(size)
        offset = tuple(
            whole + own for whole, own in zip(entry.global_offset, (*(0 for _ in ones), *start), strict=True)
        )
        yield ShardedTensor(
            prefix + entry.key,
            state[position - begin : position - begin + count].view(*ones, *size),
            state.dtype,
            (*ones, *size),
            entry.global_shape,
            offset,
            # Boxes of all sizes: no grid.
            axis_fragmentations=None,
            replica_id=entry.replica_id,
        )
        position += count


def flat_boxes(begin: int, end: int, shape: Sequence[int]) -> Iterator[tuple[Axes, Axes]]:
    """Boxes (start, size) that hold the numbers from `begin` to `end` of a tensor, counted row by row; in order."""
    if begin >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    whole_begin, whole_end = -(-begin // row), end // row
    zeros = tuple(0 for _ in shape[1:])
    if whole_begin > whole_end:
        # Within one row.
        for start, size in flat_boxes(begin - whole_end * row, end - whole_end * row, shape[1:]):
            yield (whole_end, *start), (1, *size)
        return
    for start, size in flat_boxes(begin - (whole_begin - 1) * row, row, shape[1:]) if begin % row else ():
        yield (whole_begin - 1, *start), (1, *size)
    if whole_begin < whole_end:
        yield (whole_begin, *zeros), (whole_end - whole_begin, *shape[1:])
    for start, size in flat_boxes(0, end - whole_end * row, shape[1:]):
        yield (whole_end, *start), (1, *size)
