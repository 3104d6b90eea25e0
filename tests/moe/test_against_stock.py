"""`--router topk` is megatron-core's own: outputs, gradients, losses and counts of a stock `MoELayer`, bit for bit.

The stock layer has upstream's router, experts and shared experts, the same weights and the same config. What differs on
purpose has tests of its own at the end: the logits' bias, the `position` policy, the expert bias under padding, the
gradient of the global balancing loss on several replicas. Jitter is drawn from other numbers (`test_capacity.py`).
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import tiny_run
from tests.moe.test_layer import LLAMA, B, E, H, S, build_layer, start

# Upstream's experts; the stacked ones have a test of their own (experts/test_grouped.py).
LOOP = {"moe_expert_backend": "sequential"}
PLAIN = LLAMA | LOOP | {"mlp_type": "standard"}
AUX = {"moe_aux_loss_coeff": 0.05}
SIGMOID = {"moe_router_score_function": "sigmoid"}
TOP2 = {"moe_router_topk": 2}
NO_AUX = {"moe_aux_loss_coeff": 0.0}
BALANCING = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
SHARED = {"moe_shared_expert_intermediate_size": 40}

CASES: dict[str, dict[str, Any]] = {
    "top-1": AUX,
    "top-2": AUX | TOP2,
    "top-2, softmax first": AUX | TOP2 | {"moe_router_pre_softmax": True},
    "top-1, sigmoid": AUX | SIGMOID,
    "top-2, sigmoid": AUX | SIGMOID | TOP2,
    "scaled": AUX | SIGMOID | TOP2 | {"moe_router_topk_scaling_factor": 2.5},
    "sequence loss": AUX | TOP2 | {"moe_router_load_balancing_type": "seq_aux_loss"},
    "sequence loss, sigmoid": AUX | SIGMOID | {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global loss": AUX | TOP2 | {"moe_router_load_balancing_type": "global_aux_loss"},
    "no loss": AUX | {"moe_router_load_balancing_type": "none"},
    "z-loss": AUX | TOP2 | {"moe_z_loss_coeff": 0.01},
    "z-loss alone": AUX | {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 0.01},
    "expert bias": NO_AUX | SIGMOID | TOP2 | {"moe_router_enable_expert_bias": True},
    "expert bias, capacity": AUX | SIGMOID | {"moe_router_enable_expert_bias": True, "moe_expert_capacity_factor": 0.7},
    "groups": AUX | SIGMOID | TOP2 | {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "groups, softmax": AUX | TOP2 | {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "groups, expert bias": AUX
    | SIGMOID
    | TOP2
    | {"moe_router_num_groups": 2, "moe_router_group_topk": 2, "moe_router_enable_expert_bias": True},
    "sinkhorn": NO_AUX | {"moe_router_load_balancing_type": "sinkhorn"},
    "sinkhorn, top-2": NO_AUX | TOP2 | {"moe_router_load_balancing_type": "sinkhorn", "moe_z_loss_coeff": 0.01},
    "capacity": AUX | {"moe_expert_capacity_factor": 0.5},
    "capacity, top-2": AUX | TOP2 | {"moe_expert_capacity_factor": 0.75, "moe_router_pre_softmax": True},
    "capacity, padded": AUX | TOP2 | {"moe_expert_capacity_factor": 0.75, "moe_pad_expert_input_to_capacity": True},
    "more capacity than tokens": AUX | {"moe_expert_capacity_factor": 9.0},
    "shared expert": AUX | TOP2 | SHARED,
    "gated shared expert": AUX | SHARED | {"moe_shared_expert_gate": True},
    "allgather dispatcher": AUX | TOP2 | {"moe_token_dispatcher_type": "allgather"},
    "fp64": AUX | {"moe_router_dtype": "fp64"},
    "bf16": AUX | TOP2 | {"bf16": True},
    "bf16, sigmoid, expert bias": AUX | SIGMOID | {"bf16": True, "moe_router_enable_expert_bias": True},
}


def stock_layer(layer: Any) -> Any:
    """megatron-core's own layer with the weights of ours."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    submodules = MoESubmodules(
        experts=partial(SequentialMLP, submodules=mlp), shared_experts=partial(SharedExpertMLP, submodules=mlp)
    )
    stock = MoELayer(layer.config, submodules, layer.layer_number, get_default_pg_collection())
    stock = stock.to(layer.router.weight.dtype)
    weights = layer.state_dict()
    if stock.router.bias is not None:
        weights["router.bias"] = torch.zeros_like(stock.router.bias)
    stock.load_state_dict(weights, strict=True)
    stock.set_layer_number(layer.layer_number)
    return stock.train()


def both(**flags: Any) -> tuple[Any, Any]:
    """Our layer and the stock one; expert biases, where there are any, not zero."""
    half = flags.get("bf16", False)
    layer, _ = build_layer(**PLAIN | flags)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(torch.linspace(-0.2, 0.2, E).roll(1))
    stock = stock_layer(layer)
    assert type(stock.router).__mro__[0].__module__.startswith("megatron.core")
    assert (layer.router.weight.dtype == torch.bfloat16) == half
    return layer, stock


def passes(layer: Any, half: bool) -> dict[str, list[Tensor]]:
    """Everything two passes in training and one in evaluation leave behind."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    seen: dict[str, list[Tensor]] = {}
    for seed in (7, 8):
        generator = torch.Generator().manual_seed(seed)
        x, probe = (torch.randn(S, B, H, generator=generator).to(torch.bfloat16 if half else None) for _ in range(2))
        x.requires_grad_()
        out, _ = layer(x)
        gradients = torch.autograd.grad((out * probe).sum(), [x, *layer.parameters()], allow_unused=True)
        seen.setdefault("output", []).append(out.detach())
        for name, gradient in zip(["input", *(name for name, _ in layer.named_parameters())], gradients, strict=True):
            if gradient is not None and not name.endswith("router.bias"):
                seen.setdefault(name, []).append(gradient)
    for name, entry in get_moe_metrics_tracker().metrics.items():
        if entry.values.any():
            seen[name] = [entry.values.clone()]
    get_moe_metrics_tracker().clear()
    if layer.router.expert_bias is not None:
        seen["counts"] = [layer.router.local_tokens_per_expert.clone()]
    seen["evaluation"] = [layer.eval()(x.detach())[0].detach()]
    layer.train()
    return seen


def differences(flags: dict[str, Any]) -> dict[str, float]:
    """By what differs, how much; and the number of things compared."""
    layer, stock = both(**flags)
    ours, theirs = (passes(part, flags.get("bf16", False)) for part in (layer, stock))
    assert set(ours) == set(theirs)
    found = {
        name: max(float((a - b).abs().max()) for a, b in zip(ours[name], theirs[name], strict=True)) for name in ours
    }
    assert all(bool(tensor.isfinite().all()) for tensors in ours.values() for tensor in tensors)
    assert ours["output"][0].abs().max() > 0 < ours["router.weight"][0].abs().max()
    losses = {name for name in ours if name.endswith("loss")}
    kind = flags.get("moe_router_load_balancing_type", "aux_loss")
    balancing = set() if kind == "none" or not flags["moe_aux_loss_coeff"] else {BALANCING[kind]}
    assert losses == balancing | ({"z_loss"} if "moe_z_loss_coeff" in flags else set())
    return {name: value for name, value in found.items() if value} | {"compared": float(len(found))}


def compare_all() -> dict[str, dict[str, float]]:
    start()
    return {name: differences(flags) for name, flags in CASES.items()}


@pytest.fixture(scope="module")
def compared() -> dict[str, dict[str, float]]:
    return run_ranks(1, compare_all)[0]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_stock_layer(name: str, compared: dict[str, dict[str, float]]) -> None:
    result = dict(compared[name])
    assert result.pop("compared") >= 8
    assert result == {}


# ---- what differs on purpose


def other_than_stock() -> dict[str, Any]:
    """With biases; `position`; padding under an expert bias."""
    start()
    found: dict[str, Any] = {}
    biased, _ = build_layer(mlp_type="standard", **LOOP)
    found["bias"] = [biased.router.bias is None, stock_layer(biased).router.bias is None]
    flags = {"moe_expert_capacity_factor": 0.5, "moe_token_drop_policy": "position"}
    layer, stock = both(**flags)
    first, some = layer.router, stock.router
    x = torch.randn(S, B, H, generator=torch.Generator().manual_seed(7))
    wanted = torch.nn.functional.one_hot((x.view(S * B, H) @ first.weight.T).argmax(dim=1), E)
    expected = (wanted.cumsum(dim=0) <= 4) & wanted.bool()
    found["position"] = [
        bool(torch.equal(first(x)[1], expected)),
        first(x)[1].sum(0).tolist(),
        some(x)[1].sum(0).tolist(),
    ]
    flags = SIGMOID | {"moe_router_enable_expert_bias": True, "moe_expert_capacity_factor": 0.75}
    layer, stock = both(**flags, moe_pad_expert_input_to_capacity=True)
    layer(x)
    stock(x)
    found["counts"] = [part.router.local_tokens_per_expert.tolist() for part in (layer, stock)]
    found["load"] = layer.router.take_load().tolist()
    return found


def test_deliberate_differences_are_these() -> None:
    found = run_ranks(1, other_than_stock)[0]
    assert found["bias"] == [True, False]
    equal, ours, theirs = found["position"]
    assert equal
    assert ours == theirs, "as many as upstream keeps, but the first"
    ours, theirs = found["counts"]
    assert theirs == [6.0] * E, "upstream counts what fills the experts up"
    assert ours == found["load"][:E]
    assert sum(ours) < sum(theirs)


def global_gradients() -> list[Tensor]:
    """Of the router's weight, by the global balancing loss alone, on this replica."""
    from megatron_moe.runtime import distributed
    from megatron_moe.runtime.seeds import set_seeds

    distributed.start(tiny_run().parallel)
    set_seeds(1)
    layer, stock = both(moe_aux_loss_coeff=0.05, moe_router_load_balancing_type="global_aux_loss")
    x = torch.randn(S, B, H, generator=torch.Generator().manual_seed(torch.distributed.get_rank()))
    return [torch.autograd.grad(part(x)[0].sum() * 0.0, part.router.weight)[0] for part in (layer, stock)]


def test_global_loss_weighs_the_same_on_two_replicas() -> None:
    """Gradients of replicas are averaged: stock's coefficient would count for half."""
    for ours, theirs in run_ranks(2, global_gradients):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, 2 * theirs, rtol=1e-6, atol=0)
