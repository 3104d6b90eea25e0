"""Routers that share experts out among all tokens: one MoE layer under them against loops, and whole runs.

Tolerance of a layer: fp32, 5e-6 of the largest value of each tensor: the layer multiplies by the gate's weight before
an expert's second matrix, the loop after it.

Shape legend: S = sequence, B = batch, N = S * B tokens, E = experts, H = hidden size, K = channels of routing inputs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.moe.inputs import RoutingInputs, pack_inputs, unpack_inputs
from tests.helpers.distributed import run_ranks
from tests.helpers.equivalence import SMOOTH_ADAM
from tests.helpers.experts import expert as expert_of_layer
from tests.helpers.experts import expert_of, gradients_by_expert, naive_mlp
from tests.helpers.models import Trained, assemble, assert_close, perturb, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run

S, B, H, E = 16, 2, 32, 4
N = S * B
COMMON = {"vocab_size": 100, "num_layers": 1, "expert_interval": 1, "num_experts": (E,), "mlp_type": "standard"}
EXACT = 5e-6

type Routes = list[list[tuple[int, Tensor]]]
"""For every token its experts and their weights."""


def start() -> None:
    from megatron_moe.runtime import distributed
    from megatron_moe.runtime.seeds import set_seeds

    distributed.start(tiny_run().parallel)
    set_seeds(1)


def build_layer(*, perturbed: bool = True, **flags: Any) -> Any:
    """The last MoE layer of a small model, with weights and buffers moved off where they start; needs groups."""
    from megatron_moe.config.validate import validate
    from megatron_moe.model.gpt import build_model
    from megatron_moe.moe.layer import moe_layers

    run = tiny_run(**COMMON | flags)
    validate(run, 1)
    model = build_model(run)
    if perturbed:
        perturb(model, scale=0.3)
    return moe_layers(model[0])[-1].train()


def hidden_states(seed: int = 7) -> Tensor:
    return torch.randn(S, B, H, generator=torch.Generator().manual_seed(seed))


def packed_inputs(first_sample: int = 5) -> Tensor:
    """[B, S, K]"""
    tokens_BS = torch.arange(N).reshape(B, S)
    return pack_inputs(tokens_BS, torch.arange(first_sample, first_sample + B))


class Compared(NamedTuple):
    """A layer beside a loop over tokens and experts."""

    errors: dict[str, float]
    """Of the output and every gradient, relative to the largest value."""
    sizes: dict[str, float]
    load: list[int]
    """Of the layer: tokens per expert, dropped, recycled."""
    expected_load: list[int]
    """Tokens per expert in the loop."""
    alone: int
    """Tokens without any expert in the loop."""


def compare(layer: Any, route: Callable[[Tensor, RoutingInputs], Routes]) -> Compared:
    """Run a layer and a loop on the same tokens; `route` has the logits [N, E] and returns what the loop shall do."""
    probe = torch.randn(S, B, H, generator=torch.Generator().manual_seed(8))
    x = hidden_states().requires_grad_()
    out, _ = layer(x, padding_mask=packed_inputs())
    load = layer.router.take_load().int().tolist()
    parameters = dict(layer.named_parameters())

    def gradients(output: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return {"output": output} | gradients_by_expert((output * probe).sum(), {"input": tokens, **parameters})

    ours = gradients(out, x)
    y = x.detach().requires_grad_()
    tokens_NH = y.reshape(N, H)
    routes = route(F.linear(tokens_NH, layer.router.weight), unpack_inputs(packed_inputs()))
    expected_load, outputs = [0] * layer.router.num_experts, []
    for token, experts in zip(tokens_NH, routes, strict=True):
        total = torch.zeros(H)
        for expert, weight in experts:
            total = total + weight * naive_mlp(expert_of_layer(layer.experts, expert), token)
            expected_load[expert] += 1
        outputs.append(total)
    expected = torch.stack(outputs).reshape(S, B, H)
    theirs = gradients(expected, y)
    sizes = {name: float(tensor.abs().max()) for name, tensor in theirs.items()}
    errors = {name: float((ours[name] - theirs[name]).abs().max() / max(sizes[name], 1e-3)) for name in theirs}
    return Compared(errors, sizes, load, expected_load, alone=sum(not experts for experts in routes))


def assert_equals_the_loop(result: Compared) -> None:
    assert {key: error for key, error in result.errors.items() if not error < EXACT} == {}
    assert result.load[:-2] == result.expected_load
    # What is compared is there: only an expert without tokens has no gradient.
    for key, size in result.sizes.items():
        if expert_of(key) is None:
            assert size > 1e-3, key


# ---- runs

TENSOR, PIPELINE, CONTEXT = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
OF_MOE = {"recompute_granularity": "selective", "recompute_modules": ("moe",)}
ZERO = {"use_distributed_optimizer": True}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 2, CP 2, EP 2, full recompute": (4, {TENSOR: 2, CONTEXT: 2, EXPERT: 2, EXPERT_TENSOR: 1} | FULL),
    "PP 2, DP 2, EP 2, ZeRO-1, recompute of moe, allgather": (
        4,
        {PIPELINE: 2, EXPERT: 2, "moe_token_dispatcher_type": "allgather"} | ZERO | OF_MOE,
    ),
    "TP 2, ETP 2, recompute of moe": (2, {TENSOR: 2} | OF_MOE),
}


def one_process(data: Path, flags: dict[str, Any]) -> Trained:
    """Three steps of a pyramid of 4 and 8 experts."""
    return run_ranks(1, train_and_gather, tiny_run(**data_flags(data) | SMOOTH_ADAM | flags))[0]


def assert_layout_agrees(layout: str, expected: Trained, data: Path, flags: dict[str, Any]) -> list[Trained]:
    """Losses, norms, loads, and the last gradients with all buffers, of which copies must be equal bit for bit."""
    ranks, sizes = LAYOUTS[layout]
    results = run_ranks(ranks, train_and_gather, tiny_run(**data_flags(data) | SMOOTH_ADAM | flags | sizes))
    assert_close(assemble([result.gradients for result in results]), assemble([expected.gradients]), relative=5e-5)
    for result in results:
        assert result.losses == pytest.approx(expected.losses, rel=2e-6)
        assert result.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
        assert result.loads == expected.loads
    return results


class Resumed(NamedTuple):
    """Four steps at once, and two after two from a checkpoint."""

    whole: Any
    rest: Any


def resume(data: Path, folder: Path, flags: dict[str, Any]) -> Resumed:
    from tests.helpers.training import train_curve

    flags = data_flags(data) | {"tensorboard": False} | flags
    whole = run_ranks(1, train_curve, tiny_run(**flags, train_iters=4))[0]
    run_ranks(1, train_curve, tiny_run(**flags, train_iters=2, save=str(folder)))
    rest = run_ranks(1, train_curve, tiny_run(**flags, train_iters=4, load=str(folder)))[0]
    return Resumed(whole, rest)


def assert_resumes_bit_for_bit(result: Resumed) -> None:
    assert len(result.rest.losses) == 2
    assert result.rest.losses == result.whole.losses[2:]
    assert result.rest.grad_norms == result.whole.grad_norms[2:]
    assert result.rest.loads == result.whole.loads[2:]
    assert not np.isnan(result.whole.losses).any()
