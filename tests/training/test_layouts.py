"""Parallel layouts do not change the mathematics: losses, gradient norms and expert loads agree with one process.

Tolerance: fp32, relative 2e-5. Sums are taken in another order, which moves single values by a few units in the
last place (1e-7); three steps at a high learning rate amplify that. A wrong gradient shows as 1e-2 or more.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import Curve, train_curve

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
CONTEXT, VIRTUAL = "context_parallel_size", "num_layers_per_virtual_pipeline_stage"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {TENSOR: 2}),
    "tensor 2, expert tensor 1": (2, {TENSOR: 2, EXPERT_TENSOR: 1}),
    "pipeline 2": (2, {PIPELINE: 2}),
    "pipeline 2, interleaved": (2, {PIPELINE: 2, VIRTUAL: 1}),
    "expert 2": (2, {EXPERT: 2}),
    "context 2": (2, {CONTEXT: 2}),
    "context 2, tensor 2": (4, {CONTEXT: 2, TENSOR: 2}),
    "tensor 2, pipeline 2, expert 2": (4, {TENSOR: 2, PIPELINE: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
    "tensor 2, expert 2, expert tensor 2": (4, {TENSOR: 2, EXPERT: 2}),
    "pipeline 2 interleaved, expert 2": (4, {PIPELINE: 2, VIRTUAL: 1, EXPERT: 2}),
    "expert 4": (4, {EXPERT: 4}),
}


@pytest.fixture(scope="module")
def one_process(tiny_data: Path) -> Curve:
    return run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data)))[0]


def assert_same(curve: Curve, reference: Curve, relative: float = 2e-5) -> None:
    assert len(reference.losses) == 3
    assert curve.losses == pytest.approx(reference.losses, rel=relative)
    assert curve.grad_norms == pytest.approx(reference.grad_norms, rel=10 * relative)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, tiny_data: Path, one_process: Curve) -> None:
    world_size, sizes = LAYOUTS[name]
    curves = run_ranks(world_size, train_curve, tiny_run(**data_flags(tiny_data), **sizes))
    for curve in curves:
        assert_same(curve, one_process)
        assert curve.loads == one_process.loads


ROTARY = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "num_query_groups": 2,
    "qk_layernorm": True,
    "untie_embeddings_and_output_weights": True,
    "mlp_type": "standard",
    "moe_router_topk": 2,
}
"""A Qwen3-like model: every choice that the tiny one leaves out."""


@pytest.fixture(scope="module")
def rotary_process(tiny_data: Path) -> Curve:
    return run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data), **ROTARY))[0]


@pytest.mark.parametrize("name", ["tensor 2", "pipeline 2, interleaved", "expert 2", "context 2"])
def test_layout_of_a_rotary_swiglu_model_equals_one_process(name: str, tiny_data: Path, rotary_process: Curve) -> None:
    world_size, sizes = LAYOUTS[name]
    for curve in run_ranks(world_size, train_curve, tiny_run(**data_flags(tiny_data), **ROTARY, **sizes)):
        assert_same(curve, rotary_process)


def test_loss_falls_and_every_token_reaches_an_expert(one_process: Curve) -> None:
    assert one_process.losses[-1] < one_process.losses[0]
    for loads in one_process.loads:
        assert set(loads) == {2, 4}
        assert [len(loads[2]), len(loads[4])] == [4, 8]
        assert sum(loads[2]) == sum(loads[4]) == 8 * 32


def test_accumulation_equals_one_batch(tiny_data: Path) -> None:
    """Without the auxiliary loss, which is a product of two means over a micro-batch and so is not additive."""
    flags = data_flags(tiny_data) | {"moe_aux_loss_coeff": 0.0}
    many, one = (run_ranks(1, train_curve, tiny_run(**flags, micro_batch_size=size))[0] for size in (2, 8))
    assert_same(many, one)
    assert many.loads == one.loads


SWITCHES: dict[str, tuple[int, dict[str, Any]]] = {
    "full recompute": (
        1,
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ),
    "block recompute": (
        1,
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    ),
    "selective recompute": (1, {"recompute_activations": True}),
    "recompute of experts and MLPs": (
        1,
        {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp", "moe")},
    ),
    "distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "distributed optimizer, expert 2": (4, {"use_distributed_optimizer": True, EXPERT: 2}),
    "overlapped distributed optimizer": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
    "allgather dispatcher": (2, {EXPERT: 2, "moe_token_dispatcher_type": "allgather"}),
    "unfused attention": (1, {"attention_backend": "unfused"}),
    "full recompute under tensor 2, expert 2": (
        2,
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
            TENSOR: 2,
            EXPERT: 2,
            EXPERT_TENSOR: 1,
        },
    ),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_switch_does_not_change_the_mathematics(name: str, tiny_data: Path, one_process: Curve) -> None:
    world_size, flags = SWITCHES[name]
    curves = run_ranks(world_size, train_curve, tiny_run(**(data_flags(tiny_data) | flags)))
    for curve in curves:
        assert_same(curve, one_process)
