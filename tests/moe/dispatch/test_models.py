"""Whole models: the grouped dispatcher in the place of `alltoall`, for every router, and across pipeline stages.

Tolerance: fp32, 2e-5 of the largest value of each tensor (`largest_error`): sums of a token's terms in another order,
through up to four layers and back. Half precision is compared in `test_dispatchers.py`, where errors have a reference.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.distributed import run_ranks
from tests.helpers.equivalence import EXPERT, PIPELINE, ROTARY, ROUTERS
from tests.helpers.models import Trained, assemble, assert_close, perturb, train_and_gather
from tests.helpers.plain_gpt import largest_error, model_losses, tokens
from tests.helpers.tiny import data_flags, tiny_run

MODELS: dict[str, dict[str, Any]] = {
    **{f"router {name}": flags for name, flags in ROUTERS.items()},
    "top-2": ROTARY,
    "top-3 of 16, shared expert": ROTARY
    | {"num_experts": (4, 16), "moe_router_topk": 3, "moe_shared_expert_intermediate_size": 24},
    "experts recomputed": ROTARY | {"recompute_granularity": "selective", "recompute_modules": ("moe",)},
    "layers recomputed": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "capacity": {"moe_expert_capacity_factor": 0.5, "moe_router_topk": 2},
    "loop over experts": {"moe_expert_backend": "sequential", "moe_router_topk": 2},
    "expert residual network": {"use_expert_residual_network": True, "expert_residual_layers": 2},
    "one expert a rank, and fewer": {"num_experts": (2, 4)},
}


def compare() -> dict[str, dict[str, Any]]:
    """On 4 ranks with nodes of 2."""
    from megatron_moe.model.gpt import build_model
    from megatron_moe.moe.dispatch.grouped import GroupedDispatcher
    from megatron_moe.moe.layer import moe_layers
    from megatron_moe.runtime import distributed
    from megatron_moe.runtime.seeds import set_seeds

    layout = {EXPERT: 4}
    distributed.start(tiny_run(**layout).parallel)
    found = {}
    for name, flags in MODELS.items():
        results, levels = [], []
        for kind in ({}, {"moe_token_dispatcher_type": "grouped", "ranks_per_node": 2}):
            set_seeds(1)
            run = tiny_run(vocab_size=100, **layout, **flags, **kind)
            (chunk,) = build_model(run)
            perturb([chunk], scale=0.3)
            dispatchers = [layer.token_dispatcher for layer in moe_layers(chunk)]
            grouped = [dispatcher for dispatcher in dispatchers if isinstance(dispatcher, GroupedDispatcher)]
            assert len(grouped) == (len(dispatchers) if kind else 0)
            levels = [len(dispatcher._wires) for dispatcher in grouped]
            losses = model_losses(chunk.train(), tokens(run, seed=dist.get_rank()))
            # Recompute wants this, not `torch.autograd.grad`.
            losses.mean().backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in chunk.parameters()]
            results.append([losses.detach(), *gradients])
        found[name] = {"error": largest_error(results[1], results[0]), "levels": levels, "tensors": len(results[0])}
    return found


@pytest.fixture(scope="module")
def compared() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(4, compare)


@pytest.mark.parametrize("name", MODELS)
def test_equals_alltoall(name: str, compared: list[dict[str, dict[str, Any]]]) -> None:
    for rank in compared:
        result = rank[name]
        assert result["error"] <= 2e-5
        assert result["tensors"] > 10
        assert result["levels"] == ([1, 2] if name.endswith("fewer") else [2, 2])


def trained(folder: Path, **flags: Any) -> tuple[list[Trained], dict[str, Any]]:
    """Two steps on 8 ranks; one MoE layer, on the second of two stages."""
    layers = {"num_experts": (8,), "expert_interval": 4, PIPELINE: 2, EXPERT: 4}
    run = tiny_run(**data_flags(folder), **ROTARY, **layers, clip_grad=0.0, train_iters=2, **flags)
    ranks = run_ranks(8, train_and_gather, run)
    return ranks, assemble([rank.gradients for rank in ranks])


@pytest.mark.slow
def test_a_pipeline_stage_without_experts(tiny_data: Path) -> None:
    """Groups of nodes are made by the ranks that need them alone: nobody waits for the other stage."""
    ours, gradients = trained(tiny_data, moe_token_dispatcher_type="grouped", ranks_per_node=2)
    theirs, expected = trained(tiny_data)
    assert ours[-1].losses == pytest.approx(theirs[-1].losses, rel=1e-6)
    assert_close(gradients, expected, 2e-4)
    assert ours[0].loads == theirs[0].loads
