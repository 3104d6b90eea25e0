"""The expert residual network: the identity at the start, the same under every layout, and refused where it makes no
sense. `test_layer.py` compares it with a loop over tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.config.base import ConfigError
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, assert_close, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run
from tests.moe.test_layer import COMMON, hidden_states, start

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
NETWORK = {"use_expert_residual_network": True, "expert_residual_layers": 2}


# ---- at the start


def fresh_outputs() -> dict[str, Any]:
    """Outputs of a layer with and without the network as weights are drawn, and which of its tensors are zero."""
    from megatron_moe.model.gpt import build_model
    from megatron_moe.moe.layer import moe_layers

    start()
    outputs = []
    for flags in ({}, NETWORK):
        (layer,) = moe_layers(build_model(tiny_run(**COMMON | {"moe_expert_capacity_factor": 0.5} | flags))[0])
        outputs.append(layer.train()(hidden_states())[0].detach())
    network = layer.expert_residual
    zero = sorted(name for name, tensor in network.named_parameters() if not tensor.any())
    network.zero_grad()
    layer(hidden_states())[0].square().sum().backward()
    moving = sorted(name for name, tensor in network.named_parameters() if tensor.grad.any())
    return {"equal": torch.equal(*outputs), "zero": zero, "moving": moving}


def test_it_starts_as_the_identity_and_leaves_it() -> None:
    found = run_ranks(1, fresh_outputs)[0]
    assert found["equal"]
    blocks = ("0", "1")
    biases = [f"{block}.{name}.bias" for block in blocks for name in ("mlp.linear_fc1", "mlp.linear_fc2", "norm")]
    seconds = [f"{block}.mlp.linear_fc2.weight" for block in blocks]
    assert found["zero"] == sorted(biases + seconds)
    # Gradients reach what stands between a block's output and the loss; the first matrices follow a step later.
    assert found["moving"] == sorted(seconds + [f"{block}.mlp.linear_fc2.bias" for block in blocks])


# ---- layouts

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2": (2, {TENSOR: 2}),
    "tensor 2, pipeline 2, expert 2": (4, {TENSOR: 2, PIPELINE: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
    "experts recomputed, expert 2, distributed optimizer": (
        2,
        {
            EXPERT: 2,
            "use_distributed_optimizer": True,
            "recompute_granularity": "selective",
            "recompute_modules": ("moe",),
        },
    ),
    "context 2, all recomputed": (
        2,
        {
            "context_parallel_size": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}


def trained(world_size: int, folder: Path, **flags: Any) -> tuple[Trained, dict[str, Any]]:
    flags = {"moe_router_topk": 2, "adam_eps": 1e-3, "clip_grad": 0.0} | NETWORK | flags
    ranks = run_ranks(world_size, train_and_gather, tiny_run(**data_flags(folder), **flags))
    return ranks[0], assemble([rank.gradients for rank in ranks])


@pytest.fixture(scope="module")
def one_process(tiny_data: Path) -> tuple[Trained, dict[str, Any]]:
    return trained(1, tiny_data)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, tiny_data: Path, one_process: tuple[Trained, dict[str, Any]]) -> None:
    """Losses, norms and the third step's gradients: fp32, sums in another order."""
    expected, gradients = one_process
    world_size, sizes = LAYOUTS[layout]
    found, theirs = trained(world_size, tiny_data, **sizes)
    assert found.losses == pytest.approx(expected.losses, rel=2e-5)
    assert found.grad_norms == pytest.approx(expected.grad_norms, rel=2e-4)
    assert_close(theirs, gradients, relative=5e-4)
    assert any("expert_residual.1.norm" in key for key in gradients)


def test_bf16_learns(tiny_data: Path, one_process: tuple[Trained, dict[str, Any]]) -> None:
    """Within what bf16's 8 bits leave of the fp32 run's losses."""
    found, _ = trained(1, tiny_data, bf16=True)
    assert found.losses == pytest.approx(one_process[0].losses, rel=2e-2)
    assert found.losses[-1] < found.losses[0] - 0.1


# ---- flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"expert_residual_layers": 2}, "--expert-residual-layers 2: needs --use-expert-residual-network"),
        (
            {"moe_router_topk_scaling_factor": 2.5, **NETWORK},
            "--moe-router-topk-scaling-factor 2.5: must be at most 1 with --use-expert-residual-network",
        ),
    ],
)
def test_what_cannot_work_is_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        tiny_run(**flags)
    assert message in str(raised.value)
