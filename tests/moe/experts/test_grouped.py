"""Grouped experts in whole runs: equal to sequential experts, in every layout.

Tolerances. Losses and norms of the same layout: fp32 1e-6, since gradients are summed into fp32 in another order; bf16
1e-4, since there a bias's gradient is not rounded on its way to fp32. Other layouts: as in tests/moe/test_experts.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_moe.config.base import ConfigError
from megatron_moe.moe.experts import expert_builder
from megatron_moe.moe.experts.grouped import GroupedExperts, check_alignment
from tests.helpers.checkpoints import whole_tensors
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, assert_close, perturb, start_model, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import Curve, build_trainer, record_curve, train_curve

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
ZERO = {"use_distributed_optimizer": True}
OVERLAP = ZERO | {"overlap_grad_reduce": True}
GROUPED, SEQUENTIAL = {"moe_expert_backend": "grouped"}, {"moe_expert_backend": "sequential"}
LLAMA = {"swiglu": True, "disable_bias_linear": True}

# Several micro-batches, clipping and decay that matter.
COMMON: dict[str, Any] = {"train_iters": 4, "clip_grad": 0.5, "weight_decay": 0.1, "moe_router_topk": 2}
PADDED = {"moe_expert_capacity_factor": 0.6, "moe_pad_expert_input_to_capacity": True}
RUNS: dict[str, tuple[int, dict[str, Any], float]] = {
    "bf16, SwiGLU": (1, {"bf16": True, "swiglu": True}, 1e-4),
    "squared ReLU, padded, ZeRO-1, recompute": (
        1,
        {"squared_relu": True, "recompute_granularity": "selective", "recompute_modules": ("moe",)} | PADDED | ZERO,
        1e-6,
    ),
    "top-1, overlapped, EP 2": (2, {"moe_router_topk": 1, EXPERT: 2, **OVERLAP, **LLAMA}, 1e-6),
}


@pytest.mark.parametrize("name", RUNS)
def test_trains_as_sequential_experts_do(name: str, tiny_data: Path) -> None:
    world_size, flags, tolerance = RUNS[name]

    def curve(backend: dict[str, Any]) -> Curve:
        return run_ranks(world_size, train_curve, tiny_run(**data_flags(tiny_data) | COMMON | flags | backend))[0]

    ours, theirs = curve(GROUPED), curve(SEQUENTIAL)
    assert ours.losses == pytest.approx(theirs.losses, rel=tolerance)
    assert ours.grad_norms == pytest.approx(theirs.grad_norms, rel=30 * tolerance)
    assert ours.loads[0] == theirs.loads[0]
    assert min(theirs.grad_norms) > COMMON["clip_grad"], "nothing was clipped"


# ---- layouts

STEPS = {
    "clip_grad": 0.0,
    "optimizer": "sgd",
    "lr": 0.1,
    "moe_router_topk": 2,
    "train_iters": 2,
    "num_experts": (8, 16),
    "micro_batch_size": 1,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP 8": (8, {EXPERT: 8}),
    "PP 2, ETP 2, EP 2": (8, {PIPELINE: 2, TENSOR: 2, EXPERT_TENSOR: 2, EXPERT: 2}),
}


@pytest.fixture(scope="module")
def sequential(tiny_data: Path) -> Trained:
    return run_ranks(1, train_and_gather, tiny_run(**data_flags(tiny_data) | STEPS | SEQUENTIAL))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_equals_one_process_of_sequential_experts(name: str, tiny_data: Path, sequential: Trained) -> None:
    world_size, sizes = LAYOUTS[name]
    ranks = run_ranks(world_size, train_and_gather, tiny_run(**data_flags(tiny_data) | STEPS | sizes | GROUPED))
    assert_close(assemble([rank.gradients for rank in ranks]), assemble([sequential.gradients]), 2e-5)
    assert ranks[0].losses == pytest.approx(sequential.losses, rel=2e-6)
    assert ranks[0].grad_norms == pytest.approx(sequential.grad_norms, rel=2e-6)


# ---- gradients


def of_experts(run: Any) -> dict[str, tuple[bool, float]]:
    """Of every expert parameter after a step: whether its gradient is in megatron-core's buffer, and its decay."""
    trainer = build_trainer(run)
    parameters = {
        name: parameter
        for chunk in trainer.model
        for name, parameter in chunk.named_parameters()
        if ".mlp.experts." in name
    }
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    record_curve(trainer)
    return {
        name: (parameter.grad_added_to_main_grad and bool(parameter.main_grad.any()), decay[id(parameter)])
        for name, parameter in parameters.items()
    }


def test_gradients_go_to_the_buffer_and_biases_are_not_decayed(tiny_data: Path) -> None:
    """Stacked biases have two dimensions; upstream leaves out what has one, and what is called bias."""
    flags = data_flags(tiny_data) | {"train_iters": 1, "weight_decay": 0.1}
    found = run_ranks(1, of_experts, tiny_run(**flags))[0]
    assert len(found) == 8
    for name, (in_buffer, decay) in found.items():
        assert in_buffer, name
        assert decay == (0.0 if name.endswith("bias") else 0.1), name


# ---- checkpoints


def resumed(run: Any) -> list[float]:
    return record_curve(build_trainer(run)).losses


def test_goes_on_from_a_checkpoint_of_sequential_experts(tiny_data: Path, tmp_path: Path) -> None:
    """Weights, moments and masters: bf16 with ZeRO-1 on two ranks, and what follows under both; the
    other way, and through other layouts: tests/checkpoint/test_reshard.py."""
    flags = data_flags(tiny_data) | {"swiglu": True, "bf16": True, "tensorboard": False, EXPERT: 2} | OVERLAP
    run_ranks(2, train_curve, tiny_run(**flags | SEQUENTIAL, train_iters=2, save=str(tmp_path / "first")))
    losses = [
        run_ranks(2, resumed, tiny_run(**flags | backend, train_iters=4, load=str(tmp_path / "first")))[0]
        for backend in (GROUPED, SEQUENTIAL)
    ]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    tensors = run_ranks(1, whole_tensors, tmp_path / "first")[0]
    assert sum("experts.experts.linear_fc" in key for key in tensors) == 2 * 4 * 4, sorted(tensors)


# ---- sizes


def test_sizes_that_the_kernel_does_not_take() -> None:
    check_alignment(torch.bfloat16, 512, 1024)
    with pytest.raises(
        ConfigError, match=r"--hidden-size 36: must be a multiple of 8 with --moe-expert-backend grouped"
    ):
        check_alignment(torch.bfloat16, 36, 64)
    with pytest.raises(ConfigError, match=r"width of an expert on a rank 6: must be a multiple of 4"):
        check_alignment(torch.float32, 36, 6)


# ---- parts


def weights_on_the_input() -> dict[str, float]:
    """Distances between both kinds of experts that multiply their input by the routing weight; odd sizes."""
    from megatron_moe.model.gpt import build_model
    from megatron_moe.moe.experts.layouts import convert
    from megatron_moe.moe.layer import moe_layers

    runs = [tiny_run(vocab_size=100, moe_ffn_hidden_size=25, **backend) for backend in (GROUPED, SEQUENTIAL)]
    models = [start_model(runs[0], perturbed=True), build_model(runs[1])]
    perturb(models[1])
    rows, probs = torch.randn(9, 32, requires_grad=True), torch.rand(9, requires_grad=True)
    found = []
    for (model,) in models:
        experts = moe_layers(model)[0].experts
        experts.config.moe_apply_probs_on_input = True
        out, bias = experts(rows, torch.tensor([4, 0, 2, 3]), probs)
        assert bias is None
        names, parameters = zip(*experts.named_parameters(), strict=True)
        gradients = torch.autograd.grad(
            out.square().sum(), [rows, probs, *parameters], allow_unused=True, materialize_grads=True
        )
        of_weights = convert(dict(zip(names, gradients[2:], strict=True)), "stacked")
        found.append({"output": out, "rows": gradients[0], "probs": gradients[1], **of_weights})
    return {
        name: float((found[0][name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in found[1].items()
    }


def test_routing_weights_on_the_input() -> None:
    distances = run_ranks(1, weights_on_the_input)[0]
    assert len(distances) == 7
    for name, distance in distances.items():
        assert distance < 2e-6, name


def test_every_backend_has_its_experts() -> None:
    from megatron.core.transformer.moe.experts import SequentialMLP

    assert expert_builder("grouped").func is GroupedExperts  # type: ignore[attr-defined]
    assert expert_builder("sequential").func is SequentialMLP  # type: ignore[attr-defined]


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed")
def test_transformer_engine_is_asked_for_by_name() -> None:
    with pytest.raises(ConfigError, match="--moe-expert-backend te: Transformer Engine is not installed; pip install"):
        expert_builder("te")
