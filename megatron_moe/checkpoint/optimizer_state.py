"""The optimizer's state in a checkpoint, free of the layout and of the kind of optimizer that wrote it.

megatron-core's sharded state of an optimizer holds, for every parameter, moments and fp32 master weights in the shape
of the parameter: those can be loaded under any layout. Around them it keeps what cannot: one entry for each inner
optimizer (experts have their own only when they are spread over ranks), parameter groups found again by their learning
rate, and another name for master weights with and without the distributed optimizer. So only the tensors are kept, by
their keys, and what all parameters share: the number of updates and the loss scale. The rest comes from the flags.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_moe.checkpoint import flat_states, safe_reader, torch_adam
from megatron_moe.checkpoint.in_place import keep_in_place
from megatron_moe.runtime import replace

# Understood by megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer.sharded_state_dict: optimizer state in
# the shape of the parameters it belongs to.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
MASTER = "optimizer.state.param."
PLAIN_MASTER = "optimizer.state.fp32_param."

Place = tuple[Any, ...]


def saved_state(model_sharded: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """What a checkpoint keeps: sharded `optimizer` tensors, and `optimizer_common`.

    Before the first update (fp16 may skip many steps) there are no tensors: there is nothing to keep.
    """
    updates = updates_taken(optimizer)
    tree = {}
    if updates:
        with _without_empty_parts(optimizer), _whole_buckets(optimizer):
            tree = optimizer.sharded_state_dict(model_sharded, is_loading=False, metadata=METADATA)
    scalers = [part.grad_scaler for part in _parts(optimizer) if getattr(part, "grad_scaler", None) is not None]
    common = {"updates": updates, "grad_scaler": scalers[0].state_dict() if scalers else None}
    return {"optimizer": _flat(tree), "optimizer_common": common}


class OptimizerLoad:
    """Loads what `saved_state` kept into an optimizer that may be of another layout.

    Args:
        model_sharded: sharded state of the model that is loaded.
        optimizer: of this run, fresh.
        common: the checkpoint's `optimizer_common`.
        folder: the checkpoint.
    """

    def __init__(self, model_sharded: dict[str, Any], optimizer: Any, common: dict[str, Any], folder: Path) -> None:
        self._optimizer, self._common, self._folder = optimizer, common, folder
        self._tree: Any = {}
        self._masters: dict[str, Any] = {}
        if not common["updates"]:
            return
        replace.apply(flat_states.REPLACEMENTS)
        with _without_empty_parts(optimizer), _whole_buckets(optimizer):
            torch_adam.fill_empty_states(optimizer)
            self._tree = optimizer.sharded_state_dict(model_sharded, is_loading=True, metadata=METADATA)
        stored = dist_checkpointing.load_tensors_metadata(str(folder))
        if not any(key.startswith(MASTER) for key in stored):
            # An fp32 run without distributed optimizer keeps no masters: they are the weights, which are loaded twice.
            self._masters = {name: leaf for name, leaf in _flat(self._tree).items() if leaf.key.startswith(MASTER)}
            for leaf in self._masters.values():
                leaf.key = leaf.key.removeprefix(MASTER)

    @property
    def wanted(self) -> dict[str, Any]:
        """Sharded tensors to load together with the model's."""
        return {name: leaf for name, leaf in _flat(self._tree).items() if name not in self._masters}

    def finish(self, loaded: dict[str, Any]) -> None:
        """Put the loaded tensors, by the places that `wanted` gave them, into the optimizer."""
        scaler, updates = self._common["grad_scaler"], self._common["updates"]
        if not updates:
            self._optimizer.reload_model_params()
            for part in _parts(self._optimizer):
                if scaler is not None and getattr(part, "grad_scaler", None) is not None:
                    part.grad_scaler.load_state_dict(scaler)
            return
        if self._masters:
            keep_in_place(self._masters)
            with safe_reader.parts_read() as parts:
                loaded = loaded | dist_checkpointing.load({"masters": self._masters}, str(self._folder))["masters"]
                parts.check_together()
        for place, value in _walk(self._tree):
            if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
                _put(self._tree, place, loaded[_name(place)])
            elif isinstance(value, LocalNonpersistentObject):
                _put(self._tree, place, value.unwrap())
        with _without_empty_parts(self._optimizer):
            chained = len(_parts(self._optimizer)) > 1
            for index, part in enumerate(_parts(self._optimizer)):
                state = self._tree[index] if chained else self._tree
                if state:
                    _set_common(part, state, updates, scaler)
            self._optimizer.load_state_dict(self._tree)
        torch_adam.separate_steps(self._optimizer)


def updates_taken(optimizer: Any) -> int:
    """Updates that the optimizer has made; Adam corrects its moments by it."""
    updates = [0]
    for part in _parts(optimizer):
        inner = part.optimizer
        if inner is None:
            continue
        updates += [int(group.get("step", 0)) for group in inner.param_groups]
        # SGD does not count; its momentum is there once it has made an update.
        updates += [int(state.get("step", 1)) for state in inner.state.values() if state]
    return max(updates)


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


@contextlib.contextmanager
def _without_empty_parts(optimizer: Any) -> Iterator[None]:
    """Leave the distributed optimizer of the experts aside where this pipeline stage has no experts.

    Upstream asks it for the number of its updates, which it does not have
    (`optimizer/distrib_optimizer.py:DistributedOptimizer.state_dict`).
    """
    parts = _parts(optimizer)
    kept = [part for part in parts if not isinstance(part, DistributedOptimizer) or part.buffers]
    if len(kept) == len(parts):
        yield
        return
    optimizer.chained_optimizers = kept
    try:
        yield
    finally:
        optimizer.chained_optimizers = parts


@contextlib.contextmanager
def _whole_buckets(optimizer: Any) -> Iterator[None]:
    """Let the distributed optimizer gather buckets with the padding at their ends.

    megatron-core puts the buckets of a buffer together without it, and then looks parameters up where they stand with
    it (`distrib_optimizer.py:get_parameter_state_dp_zero`, `sharded_param_state_fully_reshardable`): all that comes
    after a bucket whose size is no multiple of its padding would be saved from the wrong place.
    """
    units = [
        unit
        for part in _parts(optimizer)
        for buffer in getattr(part, "buffers", None) or ()
        for unit in (buffer, *buffer.buckets)
    ]
    before = [unit.numel_unpadded for unit in units]
    for unit in units:
        unit.numel_unpadded = unit.grad_data.numel()
    try:
        yield
    finally:
        for unit, numel in zip(units, before, strict=True):
            unit.numel_unpadded = numel


def _set_common(part: Any, state: dict[str, Any], updates: int, scaler: dict[str, Any] | None) -> None:
    """Number of updates and loss scale in the state of one inner optimizer."""
    inner = state.get("optimizer", state)
    if isinstance(part.optimizer, torch.optim.AdamW) and "param_state" not in state:
        inner["state"]["common_step"] = torch.tensor(float(updates))
    elif not isinstance(part.optimizer, torch.optim.SGD):
        for group in inner["param_groups"]:
            group["step"] = updates
    if scaler is not None and "grad_scaler" in state:
        state["grad_scaler"] = scaler


def _flat(tree: Any) -> dict[str, Any]:
    """The sharded tensors of a tree by place, master weights under one name."""
    leaves = {}
    for place, leaf in _walk(tree):
        if isinstance(leaf, (ShardedTensor, ShardedTensorFactory)):
            if leaf.key.startswith(PLAIN_MASTER):
                leaf.key = MASTER + leaf.key.removeprefix(PLAIN_MASTER)
            leaves[_name(place)] = leaf
    return leaves


def _walk(tree: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Leaves of nested dicts and lists with their places."""
    if isinstance(tree, (dict, list)):
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield from _walk(value, (*place, key))
    else:
        yield place, tree


def _name(place: Place) -> str:
    return "/".join(str(key) for key in place)


def _put(tree: Any, place: Place, value: Any) -> None:
    for key in place[:-1]:
        tree = tree[key]
    tree[place[-1]] = value
