"""Loads what megatron-core takes apart without putting it together again in other memory.

A `ShardedTensorFactory` stands for a tensor that a checkpoint holds in several entries: stacked experts, both halves of
SwiGLU. Its entries are views of the tensor, into which a checkpoint is read; then `merge_fn` concatenates them into a
second tensor of the same numbers, for all factories at once (`dist_checkpointing/mapping.py:apply_factory_merges`): a
second copy of nearly all weights of a model with experts.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor


def keep_in_place(wanted: dict[str, Any]) -> None:
    """Let the factories of a sharded state give the tensor that they took apart, if it was read into."""
    for leaf in nested_values(wanted):
        if isinstance(leaf, ShardedTensorFactory):
            leaf.merge_fn = _InPlace(leaf.data, leaf.merge_fn)


class _InPlace:
    def __init__(self, data: Tensor, merge: Any) -> None:
        self._data, self._merge = data, merge

    def __call__(self, parts: Any) -> Any:
        tensors = list(_tensors(parts))
        home = self._data.untyped_storage().data_ptr()
        views = all(part.untyped_storage().data_ptr() == home and part.dtype == self._data.dtype for part in tensors)
        # Views of all of its numbers: entries never overlap, or a checkpoint would hold something twice.
        if views and sum(part.numel() for part in tensors) == self._data.numel():
            return self._data.detach()
        return self._merge(parts)


def _tensors(parts: Any) -> Iterator[Tensor]:
    if isinstance(parts, Tensor):
        yield parts
        return
    children: Iterable[Any] = parts.values() if isinstance(parts, dict) else parts
    for part in children:
        yield from _tensors(part)
