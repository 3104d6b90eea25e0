"""The MoE layer against plain torch: a loop over tokens and experts, outputs and all gradients; capacity and losses.

Tolerance: fp32, 5e-6 of the largest value of each tensor: the layer multiplies by the gate's weight before an expert's
second matrix, the loop after it.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.base import ConfigError
from tests.helpers.distributed import run_ranks
from tests.helpers.experts import expert as expert_of_layer
from tests.helpers.experts import expert_of, gradients_by_expert, naive_mlp
from tests.helpers.models import perturb
from tests.helpers.tiny import tiny_run

S, B, H, E = 16, 2, 32, 4
T = S * B
COMMON = {"vocab_size": 100, "num_layers": 1, "expert_interval": 1, "num_experts": (E,), "moe_aux_loss_coeff": 0.0}
LLAMA = {"swiglu": True, "disable_bias_linear": True}

CASES: dict[str, dict[str, Any]] = {
    "top-1, softmax residual": {"mlp_type": "residual"},
    "top-2, softmax residual": {"mlp_type": "residual", "moe_router_topk": 2},
    "top-1, added residual": {"mlp_type": "residual", "residual_combine": "add"},
    "top-1": {"mlp_type": "standard"},
    "top-2": {"mlp_type": "standard", "moe_router_topk": 2},
    "top-2, softmax first": {"mlp_type": "standard", "moe_router_topk": 2, "moe_router_pre_softmax": True},
    "top-2, SwiGLU without biases": {"mlp_type": "standard", "moe_router_topk": 2} | LLAMA,
    "SwiGLU, softmax residual": {"mlp_type": "residual"} | LLAMA,
    "narrow experts": {"mlp_type": "residual", "moe_ffn_hidden_size": 24},
    "top-2, sigmoid": {"mlp_type": "standard", "moe_router_topk": 2, "moe_router_score_function": "sigmoid"},
    "top-1, sigmoid, scaled": {
        "mlp_type": "standard",
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
    },
    "shared expert": {"mlp_type": "standard", "moe_router_topk": 2, "moe_shared_expert_intermediate_size": 40} | LLAMA,
    "gated shared expert": {
        "mlp_type": "standard",
        "moe_shared_expert_intermediate_size": 40,
        "moe_shared_expert_gate": True,
    }
    | LLAMA,
    "capacity": {"mlp_type": "residual", "moe_expert_capacity_factor": 0.5},
    "capacity, top-2": {"mlp_type": "standard", "moe_router_topk": 2, "moe_expert_capacity_factor": 0.75},
    "capacity by position": {
        "mlp_type": "residual",
        "moe_expert_capacity_factor": 0.5,
        "moe_token_drop_policy": "position",
    },
    "capacity by position, padded": {
        "mlp_type": "standard",
        "moe_router_topk": 2,
        "moe_expert_capacity_factor": 0.6,
        "moe_token_drop_policy": "position",
        "moe_pad_expert_input_to_capacity": True,
    },
    "capacity, padded": {
        "mlp_type": "residual",
        "moe_expert_capacity_factor": 0.5,
        "moe_pad_expert_input_to_capacity": True,
    },
    "capacity of all tokens, padded": {
        "mlp_type": "residual",
        "moe_expert_capacity_factor": 4.0,
        "moe_pad_expert_input_to_capacity": True,
    },
    "pyramid: the second layer's 8 experts": {"mlp_type": "residual", "num_layers": 2, "num_experts": (E, 2 * E)},
    "pyramid, top-2, capacity": {
        "mlp_type": "residual",
        "num_layers": 2,
        "num_experts": (2 * E, 2),
        "moe_router_topk": 2,
        "moe_expert_capacity_factor": 0.9,
    },
    "expert residual network": {"mlp_type": "residual", "use_expert_residual_network": True},
    "expert residual network, top-2, capacity, RMSNorm": {
        "mlp_type": "standard",
        "moe_router_topk": 2,
        "moe_expert_capacity_factor": 0.75,
        "use_expert_residual_network": True,
        "expert_residual_layers": 2,
        "normalization": "RMSNorm",
    },
    "expert residual network, shared expert": {
        "mlp_type": "standard",
        "moe_shared_expert_intermediate_size": 40,
        "use_expert_residual_network": True,
        "expert_residual_layers": 3,
    }
    | LLAMA,
    "allgather dispatcher": {"mlp_type": "residual", "moe_router_topk": 2, "moe_token_dispatcher_type": "allgather"},
}


def build_layer(**flags: Any) -> tuple[torch.nn.Module, Any]:
    """The last MoE layer of a small model, with perturbed weights, and its run; needs started groups."""
    from megatron_moe.model.gpt import build_model
    from megatron_moe.moe.layer import moe_layers

    run = tiny_run(**COMMON | flags)
    model = build_model(run)
    perturb(model, scale=0.3)
    return moe_layers(model[0])[-1].train(), run


def start() -> None:
    from megatron_moe.runtime import distributed
    from megatron_moe.runtime.seeds import set_seeds

    distributed.start(tiny_run().parallel)
    set_seeds(1)


def hidden_states() -> Tensor:
    return torch.randn(S, B, H, generator=torch.Generator().manual_seed(7))


# ---- the reference


def naive_expert_residual(network: Any, out: Tensor, weight: Tensor | float) -> Tensor:
    deep = out
    for block in network.children():
        norm = block.norm
        if isinstance(norm, torch.nn.RMSNorm):
            normal = deep / (deep.square().mean() + norm.eps).sqrt() * norm.weight
        else:
            normal = (deep - deep.mean()) / (deep.var(correction=0) + norm.eps).sqrt() * norm.weight + norm.bias
        hidden = F.linear(normal, block.mlp.linear_fc1.weight, block.mlp.linear_fc1.bias).clamp(min=0)
        deep = deep + F.linear(hidden, block.mlp.linear_fc2.weight, block.mlp.linear_fc2.bias)
    return weight * deep + (1 - weight) * out


def naive_routing(layer: Any, run: Any, tokens: Tensor) -> list[list[tuple[int, Tensor]]]:
    """For every token its experts and their weights, before any are dropped."""
    moe = run.moe
    routes = []
    for token in tokens:
        logits = layer.router.weight @ token
        if moe.moe_router_score_function == "sigmoid":
            scores = torch.sigmoid(logits)
            chosen = torch.topk(scores, moe.moe_router_topk).indices
            weights = scores[chosen]
            if moe.moe_router_topk > 1:
                weights = weights / weights.sum()
        elif moe.pre_softmax:
            scores = torch.softmax(logits, dim=0)
            chosen = torch.topk(scores, moe.moe_router_topk).indices
            weights = scores[chosen]
        else:
            chosen = torch.topk(logits, moe.moe_router_topk).indices
            weights = torch.softmax(logits[chosen], dim=0)
        weights = weights * (moe.moe_router_topk_scaling_factor or 1.0)
        routes.append([(int(expert), weight) for expert, weight in zip(chosen, weights, strict=True)])
    return routes


def drop(routes: list[list[tuple[int, Tensor]]], run: Any) -> tuple[list[list[tuple[int, Tensor]]], int]:
    """What is left when every expert takes only its capacity, and how many assignments are gone."""
    moe = run.moe
    if moe.moe_expert_capacity_factor is None:
        return routes, 0
    count = moe.num_experts[-1]
    capacity = math.ceil(T * moe.moe_router_topk / count * moe.moe_expert_capacity_factor)
    kept: set[tuple[int, int]] = set()
    for expert in range(count):
        wanting = [(place, float(weight)) for place, route in enumerate(routes) for e, weight in route if e == expert]
        if moe.moe_token_drop_policy == "probs":
            wanting.sort(key=lambda pair: -pair[1])
        kept |= {(place, expert) for place, _ in wanting[:capacity]}
    left = [[pair for pair in route if (place, pair[0]) in kept] for place, route in enumerate(routes)]
    return left, sum(map(len, routes)) - sum(map(len, left))


def naive_layer(layer: Any, run: Any, x: Tensor) -> tuple[Tensor, list[int], int]:
    """Output [S, B, H], tokens per expert, and dropped assignments."""
    swiglu = run.model.swiglu
    tokens = x.reshape(T, H)
    routes, dropped = drop(naive_routing(layer, run, tokens), run)
    load = [0] * run.moe.num_experts[-1]
    outputs = []
    for token, route in zip(tokens, routes, strict=True):
        out = torch.zeros(H)
        for expert, weight in route:
            out = out + weight * naive_mlp(expert_of_layer(layer.experts, expert), token, swiglu)
            load[expert] += 1
        if run.moe.use_expert_residual_network:
            largest = max((weight for _, weight in route), key=float, default=0.0)
            out = naive_expert_residual(layer.expert_residual, out, largest)
        if run.moe.moe_shared_expert_intermediate_size:
            shared = naive_mlp(layer.shared_experts, token, swiglu)
            if run.moe.moe_shared_expert_gate:
                shared = shared * torch.sigmoid(layer.shared_experts.gate_weight @ token)
            out = out + shared
        if run.moe.mlp_type == "residual":
            dense = naive_mlp(layer.residual.mlp, token, swiglu)
            if run.moe.residual_combine == "add":
                out = out + dense
            else:
                coefficient = layer.residual.coefficient
                a, b = torch.softmax(F.linear(token, coefficient.weight, coefficient.bias), dim=-1)
                out = a * out + b * dense
        outputs.append(out)
    return torch.stack(outputs).reshape(S, B, H), load, dropped


# ---- the comparison


def compare(flags: dict[str, Any]) -> dict[str, Any]:
    """Errors of output and gradients relative to the largest value, and the loads on both sides."""
    layer, run = build_layer(**flags)
    probe = torch.randn(S, B, H, generator=torch.Generator().manual_seed(8))
    x = hidden_states().requires_grad_()
    out, bias = layer(x)
    assert bias is None
    counters = layer.router.take_load().int().tolist()
    parameters = dict(layer.named_parameters())

    def gradients(output: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        return {"output": output} | gradients_by_expert((output * probe).sum(), {"input": tokens, **parameters})

    ours = gradients(out, x)
    y = x.detach().requires_grad_()
    expected, load, dropped = naive_layer(layer, run, y)
    theirs = gradients(expected, y)
    sizes = {name: float(tensor.abs().max()) for name, tensor in theirs.items()}
    errors = {name: float((ours[name] - theirs[name]).abs().max() / max(sizes[name], 1e-3)) for name in theirs}
    return {"errors": errors, "sizes": sizes, "load": counters, "expected load": [*load, dropped, 0]}


def compare_all() -> dict[str, dict[str, Any]]:
    start()
    return {name: compare(flags) for name, flags in CASES.items()}


@pytest.fixture(scope="module")
def compared() -> dict[str, dict[str, Any]]:
    return run_ranks(1, compare_all)[0]


@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_tokens(name: str, compared: dict[str, dict[str, Any]]) -> None:
    result = compared[name]
    assert {key: error for key, error in result["errors"].items() if not error < 5e-6} == {}
    assert result["load"] == result["expected load"]
    residual = CASES[name]["mlp_type"] == "residual"
    assert any(key.startswith("residual.") for key in result["errors"]) == residual
    # What is compared is there: only an expert without tokens has no gradient.
    for key, size in result["sizes"].items():
        expert = expert_of(key)
        if expert is not None:
            assert (size > 0) == (result["load"][expert] > 0), key
        else:
            assert size > 1e-3, key


@pytest.mark.parametrize("name", [name for name in CASES if "capacity" in name and "all tokens" not in name])
def test_capacity_bounds_every_expert(name: str, compared: dict[str, dict[str, Any]]) -> None:
    flags, load = CASES[name], compared[name]["load"]
    topk, count = flags.get("moe_router_topk", 1), flags.get("num_experts", (E,))[-1]
    capacity = math.ceil(T * topk / count * flags["moe_expert_capacity_factor"])
    assert max(load[:-2]) == capacity, "no expert was full: this test proves nothing"
    assert load[-2] == T * topk - sum(load[:-2]) > 0


def dropped_tokens() -> list[bool]:
    """Whether the tokens that the loop drops get exactly the dense MLP's output."""
    start()
    layer, run = build_layer(mlp_type="residual", residual_combine="add", moe_expert_capacity_factor=0.5)
    x = hidden_states()
    routes, count = drop(naive_routing(layer, run, x.reshape(T, H)), run)
    out = layer(x)[0].reshape(T, H)
    dense = naive_mlp(layer.residual.mlp, x, swiglu=False).reshape(T, H)
    close = [bool(torch.allclose(a, b, atol=1e-5)) for a, b in zip(out, dense, strict=True)]
    lost = [not route for route in routes]
    assert sum(lost) == count
    return [close == lost]


def test_dropped_tokens_take_the_residual_path_only() -> None:
    assert run_ranks(1, dropped_tokens)[0] == [True]


def evaluation() -> list[Any]:
    """Counters do not move in evaluation or without gradients."""
    start()
    layer, _ = build_layer(mlp_type="residual")
    x = hidden_states()
    with torch.no_grad():
        layer(x)
    first = layer.router.take_load().sum()
    layer.eval()(x)
    second = layer.router.take_load().sum()
    layer.train()(x)
    return [float(first), float(second), float(layer.router.take_load().sum()), float(layer.router.take_load().sum())]


def test_only_training_passes_are_counted() -> None:
    assert run_ranks(1, evaluation)[0] == [0.0, 0.0, float(T), 0.0]


# ---- auxiliary losses


def balance(probs: Tensor, chosen: Tensor) -> Tensor:
    """E * sum over experts of (share of assignments) * (mean probability), tokens first."""
    return E * (chosen.float().mean(dim=0) / chosen[0].sum() * probs.mean(dim=0)).sum()


def expected_loss(kind: str, logits: Tensor, run: Any) -> Tensor:
    """Formula for one micro-batch, logits [S, B, E]."""
    if kind == "z_loss":
        return torch.logsumexp(logits, dim=-1).square().mean()
    if run.moe.moe_router_score_function == "sigmoid":
        scores = torch.sigmoid(logits)
        probs = scores / scores.sum(dim=-1, keepdim=True)
    else:
        probs = torch.softmax(logits, dim=-1)
    chosen = torch.zeros_like(probs).scatter(-1, logits.topk(run.moe.moe_router_topk).indices, 1.0)
    if kind == "seq_load_balancing_loss":
        return torch.stack([balance(probs[:, b], chosen[:, b]) for b in range(B)]).mean()
    return balance(probs.reshape(T, E), chosen.reshape(T, E))


LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "aux, top-1": ("load_balancing_loss", {}),
    "aux, top-2": ("load_balancing_loss", {"moe_router_topk": 2}),
    "aux, sigmoid": ("load_balancing_loss", {"moe_router_topk": 2, "moe_router_score_function": "sigmoid"}),
    "sequence": ("seq_load_balancing_loss", {"moe_router_load_balancing_type": "seq_aux_loss", "moe_router_topk": 2}),
    "global": ("global_load_balancing_loss", {"moe_router_load_balancing_type": "global_aux_loss"}),
    "z": ("z_loss", {"moe_z_loss_coeff": 0.01, "moe_router_load_balancing_type": "none"}),
}


def measure_losses() -> dict[str, list[float]]:
    """Per loss: value and formula; the router's gradient's error; and the value with a router of zeros."""
    from megatron_moe.moe.metrics import collect_aux_losses

    start()
    results = {}
    for name, (kind, flags) in LOSSES.items():
        layer, run = build_layer(mlp_type="standard", **{"moe_aux_loss_coeff": 0.05} | flags)
        weight = layer.router.weight
        x = hidden_states()
        out, _ = layer(x)
        (gradient,) = torch.autograd.grad(out.sum() * 0.0, weight)
        measured = collect_aux_losses(1, 1, 1)
        assert {key for key, value in measured.items() if value} == {kind}
        formula = expected_loss(kind, F.linear(x, weight), run)
        coefficient = run.moe.moe_z_loss_coeff if kind == "z_loss" else run.moe.moe_aux_loss_coeff
        # Losses are summed over tokens, to be divided by their number at the end of the step.
        (expected,) = torch.autograd.grad(formula * coefficient * T, weight)
        error = (gradient - expected).abs().max() / expected.abs().max()
        with torch.no_grad():
            weight.zero_()
        layer(x)
        results[name] = [measured[kind], float(formula), float(error), collect_aux_losses(1, 1, 1).get(kind, math.nan)]
    return results


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    return run_ranks(1, measure_losses)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_auxiliary_loss_equals_its_formula(name: str, losses: dict[str, list[float]]) -> None:
    measured, formula, gradient_error, _ = losses[name]
    assert measured == pytest.approx(formula, rel=1e-5)
    assert gradient_error < 1e-4


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("z", "global")])
def test_uniform_router_has_a_balancing_loss_of_one(name: str, losses: dict[str, list[float]]) -> None:
    assert losses[name][3] == pytest.approx(1.0, rel=1e-6)


def test_z_loss_of_a_uniform_router(losses: dict[str, list[float]]) -> None:
    assert losses["z"][3] == pytest.approx(math.log(E) ** 2, rel=1e-6)


def route_by_sinkhorn() -> dict[str, Any]:
    start()
    results: dict[str, Any] = {}
    for topk in (1, 2):
        layer, _ = build_layer(mlp_type="residual", moe_router_load_balancing_type="sinkhorn", moe_router_topk=topk)
        out, _ = layer(hidden_states())
        out.sum().backward()
        load = layer.router.take_load().tolist()
        quiet = layer.eval()(hidden_states())[0]
        finite = bool(out.isfinite().all() and quiet.isfinite().all() and layer.router.weight.grad.isfinite().all())
        results[str(topk)] = [load, finite]
    return results


def test_sinkhorn_routes_every_token() -> None:
    for topk, (load, finite) in run_ranks(1, route_by_sinkhorn)[0].items():
        assert finite
        assert sum(load[:-2]) == T * int(topk)
        assert load[-2:] == [0, 0]
        # It balances: no expert has more than half as much again as its share.
        assert max(load[:-2]) <= 1.5 * T * int(topk) / E


def wrong_count() -> str:
    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime.distributed import start as start_ranks

    run = tiny_run(vocab_size=100, num_experts=(4, 5), expert_model_parallel_size=2)
    start_ranks(run.parallel)
    try:
        build_model(run)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_count_that_cannot_be_shared_out_is_an_error() -> None:
    for message in run_ranks(2, wrong_count):
        assert message.startswith("--num-experts 5: must be a divisor or a multiple of --expert-model-parallel-size 2")


def test_padding_beyond_the_tokens_there_are_is_refused() -> None:
    """Upstream crashes there: this says so before anything is built."""
    with pytest.raises(ConfigError, match=r"--moe-expert-capacity-factor 2\.5: must be at most 2 "):
        tiny_run(**COMMON, moe_router_topk=2, moe_expert_capacity_factor=2.5, moe_pad_expert_input_to_capacity=True)


def test_reference_drops_as_documented() -> None:
    """The reference itself: 32 tokens on one expert of capacity ceil(32 / 4 * 0.5) = 4."""
    run = tiny_run(**COMMON, moe_expert_capacity_factor=0.5)
    routes = [[(0, torch.tensor(float(weight)))] for weight in np.linspace(0, 1, T)]
    left, dropped = drop(routes, run)
    assert dropped == T - 4
    assert [bool(route) for route in left] == [False] * (T - 4) + [True] * 4
