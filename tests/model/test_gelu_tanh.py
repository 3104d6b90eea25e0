"""`--gelu-tanh`: GELU by its tanh approximation in dense MLPs, residual MLPs and experts of every backend."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from megatron_moe.config.flags import parse_run
from megatron_moe.model.dry_run import report
from tests.helpers.distributed import run_ranks
from tests.helpers.models import start_model
from tests.helpers.tiny import tiny_run

FLAGS = {"vocab_size": 100, "gelu_tanh": True}


def formula(x: Tensor) -> Tensor:
    """GPT-2's, written out."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def outputs(backends: list[str]) -> list[list[tuple[float, float]]]:
    """Of every backend, for a dense MLP, a residual MLP and an expert: error, and distance from exact GELU."""
    from megatron_moe.model.gpt import build_model
    from tests.helpers.models import perturb

    start_model(tiny_run(**FLAGS))
    found = []
    for backend in backends:
        (model,) = build_model(tiny_run(**FLAGS, moe_expert_backend=backend))
        perturb([model], scale=0.3)
        x = torch.randn(64, 32)
        dense, moe = model.decoder.layers[0].mlp, model.decoder.layers[1].mlp
        counts = torch.tensor([64, 0, 0, 0])
        with torch.no_grad():
            found.append(
                [
                    distances(_sum(*dense(x[:, None]))[:, 0], x, _weights(dense)),
                    distances(_sum(*moe.residual.mlp(x[:, None]))[:, 0], x, _weights(moe.residual.mlp)),
                    distances(_sum(*moe.experts(x, counts, torch.ones(64))), x, _first_expert(moe.experts)),
                ]
            )
    return found


def _sum(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias


def _weights(mlp: Any) -> list[Tensor]:
    return [mlp.linear_fc1.weight, mlp.linear_fc1.bias, mlp.linear_fc2.weight, mlp.linear_fc2.bias]


def _first_expert(experts: Any) -> list[Tensor]:
    if hasattr(experts, "local_experts"):
        return _weights(experts.local_experts[0])
    return [tensor[0] for tensor in _weights(experts)]


def distances(out: Tensor, x: Tensor, weights: list[Tensor]) -> tuple[float, float]:
    fc1, bias1, fc2, bias2 = weights

    def distance(function: Callable[[Tensor], Tensor]) -> float:
        return float((out - linear(function(linear(x, fc1, bias1)), fc2, bias2)).abs().max())

    return distance(formula), distance(gelu)


def test_every_mlp_computes_it() -> None:
    """fp32; the two kinds of GELU differ by up to 5e-4, times the weights of the second matrix."""
    for backend in run_ranks(1, outputs, ["grouped", "sequential"])[0]:
        for error, exact in backend:
            assert error < 2e-6
            assert exact > 1e-5


def test_the_dry_run_names_it() -> None:
    run, _ = parse_run(["--recipe", "pai-gpt-moe-16b", "--gelu-tanh"], prog="pretrain", description="")
    assert "LayerNorm, GELU by tanh, biases" in report(run, 1)
