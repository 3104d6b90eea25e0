"""What a checkpoint holds of grouped experts against what upstream's own code makes of the same weights.

SequentialMLP runs as it is. Transformer Engine is not installed where these tests run. Of its experts the code that
names and places tensors runs: `TEGroupedMLP.sharded_state_dict` and, cut out of upstream's file,
`TEGroupedLinear._sharded_state_dict_grouped`, over modules that hold the same weights and nothing else. So keys,
shapes, places and replicas are shown to be the same. Not shown is that Transformer Engine's kernels take the rows of a
weight in the same order; that is upstream's claim ("interchangable with SequentialMLP's").
"""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.distributed import run_ranks
from tests.helpers.models import perturb, start_model
from tests.helpers.tiny import tiny_run

EXPERT, TENSOR, EXPERT_TENSOR = (
    "expert_model_parallel_size",
    "tensor_model_parallel_size",
    "expert_tensor_parallel_size",
)
PREFIX = "decoder.layers.1.mlp.experts."

type Entries = dict[tuple[Any, ...], Any]
"""By key, place and everything else that must be equal: the values."""


def entries(tree: dict[str, Any]) -> Entries:
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

    from megatron_moe.model.init import _leaves

    found: Entries = {}
    for leaf in _leaves(tree):
        for part in _leaves(leaf.build()) if isinstance(leaf, ShardedTensorFactory) else [leaf]:
            name = (type(part).__name__, part.key, part.global_offset, part.global_shape, part.replica_id)
            if isinstance(part, ShardedObject):
                value = part.data
            else:
                name = (*name, part.local_shape, part.axis_fragmentations, part.prepend_axis_num, part.dtype)
                value = part.data.detach().clone()
            assert name not in found
            found[name] = value
    return found


def compare(ours: Entries, theirs: Entries) -> list[str]:
    """What differs."""
    wrong = [f"only here: {name}" for name in ours.keys() - theirs.keys()]
    wrong += [f"only upstream: {name}" for name in theirs.keys() - ours.keys()]
    for name in ours.keys() & theirs.keys():
        same = torch.equal(ours[name], theirs[name]) if isinstance(ours[name], torch.Tensor) else ours[name] is None
        if not same:
            wrong.append(f"other values: {name}")
    return wrong


def both(flags: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Models, and their grouped and sequential experts of this rank, as they start."""
    from megatron_moe.model.gpt import build_model
    from megatron_moe.moe.layer import moe_layers

    run = tiny_run(vocab_size=100, moe_expert_backend="grouped", **flags)
    models = [start_model(run), build_model(tiny_run(vocab_size=100, moe_expert_backend="sequential", **flags))]
    return models, [moe_layers(model)[0].experts for (model,) in models]


def as_transformer_engine(experts: Any) -> dict[str, Any]:
    """What upstream's code for Transformer Engine's experts makes of these weights."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import experts as upstream

    place_weights = _cut_out("_sharded_state_dict_grouped")
    groups = SimpleNamespace(ep=experts.ep_group, expt_dp=experts.dp_group, expt_dp_gtp_remat=experts.dp_group)
    count = experts.num_local_experts

    class Linear(torch.nn.Module):
        def __init__(self, linear: Any, axes: dict[str, int]) -> None:
            super().__init__()
            self._pg_collection, self._tp_group, self._linear, self._axes = groups, experts.tp_group, linear, axes
            self.num_gemms, self.use_bias = count, linear.bias is not None

        def state_dict(self, *, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:  # type: ignore[override]
            named = {f"{name}{i}": part for name, p in self._linear.named_parameters() for i, part in enumerate(p)}
            return named | {"_extra_state": None}

        def _split_extra_state(self, state: Any) -> list[Any]:
            return [state] * count

        def sharded_state_dict(self, *, prefix: str, sharded_offsets: Any, metadata: Any) -> dict[str, Any]:
            axes = {f"{index}.{name}": axis for index in range(count) for name, axis in self._axes.items()}
            return place_weights(self, axes, prefix, sharded_offsets, metadata)

    # TEColumnParallelGroupedLinear and TERowParallelGroupedLinear.
    modules = {
        "linear_fc1": Linear(experts.linear_fc1, {"weight": 0, "bias": 0}),
        "linear_fc2": Linear(experts.linear_fc2, {"weight": 1}),
    }
    grouped = SimpleNamespace(
        _modules=modules,
        config=experts.config,
        ep_group=experts.ep_group,
        tp_group=experts.tp_group,
        num_local_experts=count,
    )
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    return upstream.TEGroupedMLP.sharded_state_dict(grouped, PREFIX, (), metadata)


def _cut_out(function: str) -> Any:
    """A method of a class that upstream defines only beside Transformer Engine."""
    import megatron.core.extensions
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
    from megatron.core.utils import get_pg_rank, get_pg_size

    source = Path(inspect.getfile(megatron.core.extensions)).parent / "transformer_engine.py"
    found = [
        node
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == function
    ]
    assert len(found) == 1, f"{source} has no {function} any more: see what writes Transformer Engine's experts now"
    scope = {
        "torch": torch,
        "ShardedObject": ShardedObject,
        "replace_prefix_for_sharding": replace_prefix_for_sharding,
        "make_sharded_tensors_for_checkpoint": make_sharded_tensors_for_checkpoint,
        "get_pg_rank": get_pg_rank,
        "get_pg_size": get_pg_size,
    }
    exec(compile(ast.Module(found, []), str(source), "exec"), scope)
    return scope[function]


def on_a_rank(flags: dict[str, Any]) -> dict[str, Any]:
    from megatron_moe.moe.experts.layouts import convert

    models, (grouped, sequential) = both(flags)
    start = compare(entries(grouped.sharded_state_dict(PREFIX)), entries(sequential.sharded_state_dict(PREFIX)))
    for model in models:
        perturb(model)
    tree = grouped.sharded_state_dict(PREFIX)
    ours = entries(tree)
    marks = ("allreduce", "tensor_model_parallel", "partition_stride", "sequence_parallel")
    theirs = dict(sequential.local_experts[0].named_parameters())
    attributes = {
        f"{name} {mark}": (getattr(parameter, mark, None), getattr(theirs[name], mark, None))
        for name, parameter in grouped.named_parameters()
        for mark in marks
    }
    with torch.no_grad():
        halved = {
            name: leaf.merge_fn([part.data / 2 for part in leaf.build()])
            for name, leaf in tree.items()
            if hasattr(leaf, "merge_fn")
        }
    before = {name: tensor.detach().clone() for name, tensor in grouped.state_dict().items()}
    sequential.load_state_dict(convert(grouped.state_dict(), "sequential"), strict=True)
    grouped.load_state_dict(sequential.state_dict(), strict=True)
    return {
        "start": start,
        "sequential": compare(ours, entries(sequential.sharded_state_dict(PREFIX))),
        "te": compare(ours, entries(as_transformer_engine(grouped))),
        "count": len(ours),
        "attributes": {name: pair for name, pair in attributes.items() if pair[0] != pair[1]},
        "not put together": [n for n, p in grouped.named_parameters() if not torch.equal(halved[PREFIX + n], p / 2)],
        "not taken over": [n for n, p in grouped.named_parameters() if not torch.equal(before[n], p)],
    }


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "one process, SwiGLU without biases": (1, {"swiglu": True, "disable_bias_linear": True}),
    "EP 2, ETP 2, SwiGLU": (4, {TENSOR: 2, EXPERT: 2, EXPERT_TENSOR: 2, "swiglu": True}),
    "EP 2, DP 2": (4, {EXPERT: 2}),
}


@pytest.mark.parametrize("name", CASES)
def test_weights_start_and_are_kept_as_upstreams(name: str) -> None:
    world_size, flags = CASES[name]
    for rank in run_ranks(world_size, on_a_rank, flags):
        assert rank.pop("count") > 0
        assert not any(rank.values()), rank
