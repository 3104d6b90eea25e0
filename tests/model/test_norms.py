"""Norms equal torch's and the formula, and carry the mark by which their gradients are summed."""

import pytest
import torch

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import tiny_run

EPSILON = 1e-5


def build(normalization: str, sequence_parallel: bool, width: int = 24) -> torch.nn.Module:
    import dataclasses

    from megatron_moe.model.norms import build_norm
    from megatron_moe.model.transformer_config import build_transformer_config
    from megatron_moe.runtime import cpu

    cpu.install()
    config = build_transformer_config(tiny_run(normalization=normalization, num_experts=None, mlp_type="standard"))
    config = dataclasses.replace(
        config,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=2 if sequence_parallel else 1,
    )
    return build_norm(config, width, eps=EPSILON)


def on_one_rank(normalization: str) -> dict[str, float]:
    """Largest errors of the output against torch's own function and the formula, and of the gradient."""
    torch.manual_seed(0)
    norm = build(normalization, sequence_parallel=False)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn_like(parameter))
    x = torch.randn(5, 2, 24, requires_grad=True)
    y = norm(x)
    y.square().sum().backward()

    z = x.detach().double().requires_grad_()
    weight = norm.weight.detach().double()
    if normalization == "RMSNorm":
        formula = z / (z.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight
        official = torch.nn.functional.rms_norm(x, (24,), norm.weight, EPSILON)
    else:
        centred = z - z.mean(-1, keepdim=True)
        formula = centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight + norm.bias.detach()
        official = torch.nn.functional.layer_norm(x, (24,), norm.weight, norm.bias, EPSILON)
    formula.square().sum().backward()
    return {
        "torch": float((y - official).abs().max()),
        "formula": float((y - formula).abs().max()),
        "gradient": float((x.grad - z.grad).abs().max()),
        "parameters": len(list(norm.parameters())),
    }


@pytest.mark.parametrize(("normalization", "parameters"), [("LayerNorm", 2), ("RMSNorm", 1)])
def test_equals_torch_and_the_formula(normalization: str, parameters: int) -> None:
    """fp32 against float64: values up to 10, so 1e-5 is a few units in the last place."""
    errors = run_ranks(1, on_one_rank, normalization)[0]
    assert errors["torch"] == 0.0
    assert errors["formula"] < 1e-5
    assert errors["gradient"] < 1e-4
    assert errors["parameters"] == parameters


def marks(sequence_parallel: bool) -> list[bool]:
    return [
        parameter.sequence_parallel
        for kind in ("LayerNorm", "RMSNorm")
        for parameter in build(kind, sequence_parallel).parameters()
    ]


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_parameters_are_marked_for_sequence_parallelism(sequence_parallel: bool) -> None:
    assert run_ranks(1, marks, sequence_parallel)[0] == [sequence_parallel] * 3
