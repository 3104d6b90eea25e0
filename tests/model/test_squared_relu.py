"""`--squared-relu`: relu(x)^2 in dense MLPs and experts; as many parameters and operations as with GELU."""

import dataclasses
from typing import Any

import pytest
import torch

from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import parse_run
from megatron_moe.model.dry_run import report
from megatron_moe.model.flops import training_flops_per_token
from megatron_moe.model.parameters import count_parameters
from tests.helpers.distributed import run_ranks
from tests.helpers.models import start_model
from tests.helpers.tiny import tiny_run

SQUARED = {"vocab_size": 100, "squared_relu": True}


def dense_mlp() -> dict[str, Any]:
    (model,) = start_model(tiny_run(**SQUARED), perturbed=True)
    mlp = model.decoder.layers[0].mlp
    x = torch.randn(5, 1, 32)
    out, bias = mlp(x)
    hidden = torch.nn.functional.linear(x, mlp.linear_fc1.weight, mlp.linear_fc1.bias).clamp(min=0) ** 2
    expected = hidden @ mlp.linear_fc2.weight.t()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"close": torch.allclose(out, expected, rtol=1e-5, atol=1e-6), "bias": bias is not None, "size": parameters}


def test_a_dense_mlp_computes_it() -> None:
    """Experts: tests/moe/experts/test_functions.py."""
    found = run_ranks(1, dense_mlp)[0]
    assert found == {
        "close": True,
        "bias": True,
        "size": count_parameters(tiny_run(**SQUARED), padded_vocab=True).total,
    }


def test_counts_are_those_of_gelu() -> None:
    squared = tiny_run(**SQUARED)
    gelu = dataclasses.replace(squared, model=dataclasses.replace(squared.model, squared_relu=False))
    assert count_parameters(squared) == count_parameters(gelu)
    assert training_flops_per_token(squared) == training_flops_per_token(gelu)


def test_the_dry_run_names_it() -> None:
    run, _ = parse_run(["--recipe", "pai-gpt-moe-16b", "--squared-relu"], prog="pretrain", description="")
    assert "LayerNorm, squared ReLU, biases" in report(run, 1)


def test_not_with_swiglu() -> None:
    with pytest.raises(ConfigError, match="--swiglu and --squared-relu: give one of them"):
        tiny_run(**SQUARED, swiglu=True)
