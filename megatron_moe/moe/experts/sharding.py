"""What a checkpoint holds of stacked experts: exactly what upstream's `SequentialMLP` writes.

Key, global shape [all experts, ...] and one entry for each expert and, of gated first matrices, for each half
(`megatron/core/transformer/moe/experts.py:SequentialMLP.sharded_state_dict`,
`transformer/mlp.py:MLP.sharded_state_dict` and `apply_swiglu_sharded_factory`). Transformer Engine's experts write the
same (`TEGroupedMLP.sharded_state_dict`). One parameter stands for many entries, so it is a `ShardedTensorFactory`, with
which optimizer state is taken apart and put together like the weights; the entries are views of the parameter.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedObject, ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_moe.moe.experts.layouts import EXTRA_STATE, LINEARS

type Offset = tuple[int, int, int]
"""Axis, position and number of pieces along it."""

# What tensor parallelism splits of one expert's tensor; None: every rank has it whole.
SPLIT_AXES: dict[str, int | None] = {
    "linear_fc1.weight": 0,
    "linear_fc1.bias": 0,
    "linear_fc2.weight": 1,
    "linear_fc2.bias": None,
}


def sharded_experts(
    experts: Any, prefix: str, sharded_offsets: tuple[Offset, ...], metadata: dict[str, Any] | None
) -> dict[str, Any]:
    """Sharded state of a `GroupedExperts`.

    Args:
        experts: the module.
        prefix: of its keys.
        sharded_offsets: axes that stand before the experts'.
        metadata: upstream's.
    """
    # Another format, with a key for each expert, which this package does not write.
    assert not (metadata or {}).get("singleton_local_shards", False)
    tensors = _EntriesOf(experts, sharded_offsets)
    state: dict[str, Any] = {}
    for name, parameter in experts.named_parameters():
        state[f"{prefix}{name}"] = tensors.factory(f"{prefix}experts.{name}", name, parameter)
    for linear in LINEARS:
        for index in range(experts.num_local_experts):
            # Empty; it is there because upstream's linear layers have one (tensor_parallel/layers.py:get_extra_state).
            state[f"{prefix}{linear}.{EXTRA_STATE}{index}"] = tensors.extra_state(
                f"{prefix}experts.{linear}.{EXTRA_STATE}", index
            )
    return state


class _EntriesOf:
    def __init__(self, experts: Any, sharded_offsets: tuple[Offset, ...]) -> None:
        self._before = tuple(sharded_offsets)
        self._first = experts.ep_group.rank() * experts.num_local_experts
        self._all = experts.ep_group.size() * experts.num_local_experts
        self._tensor_rank, self._tensor_size = experts.tp_group.rank(), experts.tp_group.size()
        self._copy = experts.dp_group.rank()
        self._gated = experts.config.gated_linear_unit

    def factory(self, key: str, name: str, parameter: Tensor) -> ShardedTensorFactory:
        """Entries of one stacked parameter."""
        axis = SPLIT_AXES[name]
        halves = 2 if self._gated and name.startswith("linear_fc1.") else 1

        @torch.no_grad()
        def build(key: str, stacked: Tensor, replica: ReplicaId, flattened_range: slice | None) -> list[ShardedTensor]:
            assert flattened_range is None
            entries = []
            for index, tensor in enumerate(stacked):
                for half, part in enumerate(tensor.chunk(halves) if halves > 1 else [tensor]):
                    offsets = [*self._before, self._expert(index)]
                    if axis is not None:
                        place = self._tensor_rank + half * self._tensor_size
                        offsets.append((axis + len(offsets), place, halves * self._tensor_size))
                    entries.append(
                        ShardedTensor.from_rank_offsets(
                            key, part, *offsets, replica_id=replica, prepend_axis_num=len(self._before) + 1
                        )
                    )
            return entries

        @torch.no_grad()
        def merge(parts: list[Tensor]) -> Tensor:
            whole = [torch.cat(parts[start : start + halves]) for start in range(0, len(parts), halves)]
            return torch.stack(whole)

        replica = (0, self._tensor_rank if axis is None else 0, self._copy)
        return ShardedTensorFactory(key, parameter, build, merge, replica)

    def extra_state(self, key: str, index: int) -> ShardedObject:
        """The empty state of one expert's linear layer."""
        places = sorted((*self._before, self._expert(index)))
        shape, offset = tuple(pieces for _, _, pieces in places), tuple(place for _, place, _ in places)
        return ShardedObject(key, None, shape, offset, (0, self._tensor_rank, self._copy))

    def _expert(self, index: int) -> Offset:
        return len(self._before), self._first + index, self._all
