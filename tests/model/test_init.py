"""Initial weights depend on the seed alone: the same bits under every layout, and the documented spread."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.distributed import run_ranks
from tests.helpers.models import Shard, assemble, shards, start_model
from tests.helpers.tiny import tiny_run

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
STD, LAYERS = 0.02, 4

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {TENSOR: 2}),
    "pipeline 2": (2, {PIPELINE: 2}),
    "expert 2": (2, {EXPERT: 2}),
    "interleaved": (2, {PIPELINE: 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "context 2": (2, {"context_parallel_size": 2}),
    "tensor 2, pipeline 2, expert 2": (4, {TENSOR: 2, PIPELINE: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
    "tensor 2, expert tensor 2, expert 2": (4, {TENSOR: 2, EXPERT: 2}),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "GPT": {"vocab_size": 300},
    "Llama": {
        "vocab_size": 300,
        "swiglu": True,
        "disable_bias_linear": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
        "num_query_groups": 2,
        "qk_layernorm": True,
    },
}


def initial_weights(**flags: Any) -> list[Shard]:
    return shards(start_model(tiny_run(**flags)))


def rank_weights(flags: dict[str, Any]) -> list[Shard]:
    return initial_weights(**flags)


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, np.ndarray]]:
    return {name: assemble(run_ranks(1, rank_weights, flags)) for name, flags in VARIANTS.items()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_do_not_depend_on_the_layout(layout: str, variant: str, one_process: dict[str, Any]) -> None:
    world_size, sizes = LAYOUTS[layout]
    weights = assemble(run_ranks(world_size, rank_weights, VARIANTS[variant] | sizes))
    expected = one_process[variant]
    assert set(weights) == set(expected)
    for key, tensor in expected.items():
        np.testing.assert_array_equal(weights[key], tensor, err_msg=key)


@pytest.mark.parametrize("variant", VARIANTS)
def test_spread_of_every_kind_of_tensor(variant: str, one_process: dict[str, Any]) -> None:
    """Within 5 standard errors of the standard deviation, std / sqrt(2 n), where matrices have n values."""
    seen = set()
    for key, tensor in one_process[variant].items():
        kind = key.rsplit(".", 1)[-1]
        if kind == "bias":
            assert not tensor.any(), key
        elif "norm" in key:
            assert (tensor == 1).all(), key
        else:
            output = key.endswith(("linear_proj.weight", "linear_fc2.weight"))
            expected = STD / math.sqrt(2 * LAYERS) if output else STD
            assert tensor.std() == pytest.approx(expected, rel=5 / math.sqrt(2 * tensor.size)), key
            assert abs(tensor.mean()) < 5 * expected / math.sqrt(tensor.size), key
        seen.add(kind if kind == "bias" else "norm" if "norm" in key else ".".join(key.split(".")[-2:]))
    wanted = {"word_embeddings.weight", "linear_qkv.weight", "linear_proj.weight", "router.weight", "norm"}
    wanted |= {"coefficient.weight"}
    wanted |= {"bias", "position_embeddings.weight"} if variant == "GPT" else {"output_layer.weight"}
    assert wanted <= seen


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_two_matrices_are_alike(variant: str, one_process: dict[str, Any]) -> None:
    """Layers, experts of a layer, gate and up projection, residual MLP and experts all differ."""
    matrices = []
    for tensor in one_process[variant].values():
        if tensor.ndim >= 2 and tensor.std() > 0:
            matrices += list(tensor.reshape(-1, *tensor.shape[-2:]))
    assert len(matrices) > 2 * (4 + 8)
    firsts = [matrix[0, :4].tobytes() for matrix in matrices]
    assert len(set(firsts)) == len(firsts)


def test_seed_decides() -> None:
    flags = VARIANTS["GPT"]
    first, again, other = (assemble(run_ranks(1, rank_weights, flags | {"seed": seed})) for seed in (1234, 1234, 1235))
    assert all(np.array_equal(first[key], again[key]) for key in first)
    drawn = [key for key in first if first[key].std() > 0]
    assert drawn
    assert not any(np.array_equal(first[key], other[key]) for key in drawn)


def bf16_against_fp32() -> list[bool]:
    """bf16 weights are the fp32 ones, rounded."""
    from megatron_moe.model.gpt import build_model

    flags = VARIANTS["GPT"]
    fp32 = {entry.key: entry.values for entry in initial_weights(**flags)}
    half = {entry.key: entry.values for entry in shards(build_model(tiny_run(**flags, bf16=True)))}
    return [
        bool(np.array_equal(torch.from_numpy(fp32[key]).bfloat16().float().numpy(), half[key]))
        for key in fp32
        # several shards share a key: the last one counts on both sides
    ]


def test_bf16_starts_from_the_rounded_weights() -> None:
    equal = run_ranks(1, bf16_against_fp32)[0]
    assert equal
    assert all(equal)


def uncovered_parameter() -> str:
    from megatron_moe.model.init import initialize_weights

    (chunk,) = start_model(tiny_run(vocab_size=300))
    sharded = chunk.sharded_state_dict

    def without_router(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = sharded(*args, **kwargs)
        return {key: value for key, value in state.items() if "router.weight" not in key}

    chunk.sharded_state_dict = without_router
    try:
        initialize_weights(chunk, seed=1, std=0.02, num_layers=4)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_parameter_that_would_stay_uninitialised_is_an_error() -> None:
    assert "router.weight" in run_ranks(1, uncovered_parameter)[0]
