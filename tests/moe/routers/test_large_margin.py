"""`large-margin` against loops over tokens in fp64, with angles by acos; margin 1; the anneal of beta; layouts.

Tolerance of a router: its fp32 against fp64, 2e-6 of the largest value of a tensor.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.validate import validate
from megatron_moe.config.yaml_io import save_run
from megatron_moe.moe.assignment import balanced_assignment
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, train_and_gather
from tests.helpers.sharing import (
    FULL,
    LAYOUTS,
    B,
    E,
    H,
    N,
    S,
    assert_layout_agrees,
    assert_resumes_bit_for_bit,
    build_layer,
    hidden_states,
    one_process,
    packed_inputs,
    resume,
    start,
)
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve

MARGIN = {"router": "large-margin"}
SIGMOID = {"moe_router_score_function": "sigmoid"}
TOP2 = {"moe_router_topk": 2}
# So that the margin counts from the first step.
NEAR = {"router_margin_beta": 0.5}
ADDITIVE = {"router_margin_type": "additive"}
ELSAYED = {"router_margin_type": "elsayed", "router_margin": 0.6, "router_margin_loss_coeff": 0.3}

CASES: dict[str, dict[str, Any]] = {
    "m = 2": NEAR,
    "m = 3": NEAR | {"router_margin": 3.0},
    "m = 4, top-2": NEAR | TOP2 | {"router_margin": 4.0},
    "m = 2, beta annealed": {"router_margin_beta": 8.0, "router_margin_beta_decay": 0.7},
    "m = 2, beta at its minimum": {
        "router_margin_beta": 8.0,
        "router_margin_beta_decay": 0.1,
        "router_margin_beta_min": 0.25,
    },
    "m = 2, gate": NEAR | {"router_margin_gate": True},
    "m = 2, gate, top-2": NEAR | TOP2 | {"router_margin_gate": True},
    "m = 2, self": NEAR | {"router_margin_target": "self"},
    "m = 2, balanced, top-2": NEAR | TOP2 | {"router_margin_target": "balanced"},
    "m = 2, sigmoid, top-2": NEAR | TOP2 | SIGMOID,
    "m = 3, sequence loss": NEAR | {"router_margin": 3.0, "moe_router_load_balancing_type": "seq_aux_loss"},
    "m = 2, no balancing loss": NEAR | {"moe_aux_loss_coeff": 0.0},
    "additive": ADDITIVE,
    "additive, gate, self": ADDITIVE | {"router_margin_gate": True, "router_margin_target": "self"},
    "additive, scale": ADDITIVE | {"router_margin_scale": 6.0, "router_margin": 0.3},
    "additive, scale, balanced": ADDITIVE | {"router_margin_scale": 6.0, "router_margin_target": "balanced"},
    "elsayed": ELSAYED,
    "elsayed, top-2": ELSAYED | TOP2,
    "elsayed, round robin": ELSAYED | {"router_margin_target": "round_robin"},
}
STEP = 4


# ---- the reference, in fp64


def margined(z: Tensor, x: Tensor, w: Tensor, target: int, flags: Any, beta: float) -> Tensor:
    """A token's logits [E] with its target's lowered."""
    length = x.norm() * w[target].norm()
    if flags.router_margin_type == "lsoftmax":
        m = int(flags.margin)
        theta = torch.acos(z[target] / length)
        k = math.floor(m * float(theta.detach()) / math.pi)
        psi = (-1) ** k * torch.cos(m * theta) - 2 * k
        lowered = (length * psi + beta * z[target]) / (1 + beta)
    elif flags.router_margin_scale is not None:
        lowered = flags.router_margin_scale * (x @ w[target] / length - flags.margin)
    else:
        lowered = length * (z[target] / length - flags.margin)
    return torch.stack([lowered if e == target else z[e] for e in range(E)])


def targets(z: Tensor, flags: Any) -> list[int]:
    """Of tokens in the layer's order, place by place; samples count in their order."""
    if flags.margin_target == "self":
        return [int(row.argmax()) for row in z]
    by_sample = [(token % B) * S + token // B for token in range(N)]
    if flags.margin_target == "round_robin":
        return [number % E for number in by_sample]
    whole = torch.empty_like(z)
    whole[by_sample] = z
    return balanced_assignment(whole.float())[by_sample].tolist()


def scores_of(z: Tensor, moe: Any) -> Tensor:
    return torch.sigmoid(z) if moe.moe_router_score_function == "sigmoid" else torch.softmax(z, dim=0)


def balancing(rows: list[Tensor], moe: Any) -> Tensor:
    """E * sum over experts of share of assignments * mean score."""
    scores = [scores_of(row, moe) / scores_of(row, moe).sum() for row in rows]
    share = torch.zeros(E, dtype=torch.float64)
    for score in scores:
        for expert in score.topk(moe.moe_router_topk).indices.tolist():
            share[expert] += 1 / (len(rows) * moe.moe_router_topk)
    return E * (share * torch.stack(scores).mean(dim=0)).sum()


def naive(x_SBH: Tensor, w: Tensor, run: Any, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [N, E], map [N, E], and what is added to the loss, as a sum over tokens."""
    moe, flags = run.moe, run.routing
    x = x_SBH.reshape(N, H)
    z = x @ w.T
    if flags.router_margin_scale is not None:
        z = torch.stack(
            [torch.stack([flags.router_margin_scale * (a @ b) / (a.norm() * b.norm()) for b in w]) for a in x]
        )
    target = targets(z.detach(), flags)
    rows, extra = list(z), torch.zeros((), dtype=torch.float64)
    if flags.router_margin_type == "elsayed":
        for n, i in enumerate(target):
            apart = [(w[i] - w[j]).norm().detach() for j in range(E)]
            short = [torch.relu(flags.margin - (z[n, i] - z[n, j]) / apart[j]) for j in range(E) if j != i]
            extra = extra + flags.router_margin_loss_coeff * torch.stack(short).max()
    else:
        rows = [margined(z[n], x[n], w, target[n], flags, beta) for n in range(N)]
    probs, chosen = [], torch.zeros(N, E, dtype=torch.bool)
    for n, row in enumerate(rows):
        experts = row.topk(moe.moe_router_topk).indices.tolist()
        chosen[n, experts] = True
        weighed = row if flags.router_margin_gate else z[n]
        if moe.moe_router_score_function == "softmax" and not moe.pre_softmax:
            values = torch.softmax(weighed[experts], dim=0)
        else:
            values = scores_of(weighed, moe)[experts]
            if moe.moe_router_score_function == "sigmoid" and len(experts) > 1:
                values = values / values.sum()
        probs.append(torch.zeros(E, dtype=torch.float64).index_put((torch.tensor(experts),), values))
    parts = [rows]
    if moe.moe_router_load_balancing_type == "seq_aux_loss":
        parts = [[rows[n] for n in range(N) if n % B == b] for b in range(B)]
    loss = torch.stack([balancing(part, moe) for part in parts]).mean()
    return torch.stack(probs), chosen, extra + moe.moe_aux_loss_coeff * N * loss


def built_router(**flags: Any) -> Any:
    router = build_layer(**flags).router
    router.begin_step(STEP)
    router.inputs = unpacked()
    return router


def unpacked() -> Any:
    from megatron_moe.moe.inputs import unpack_inputs

    return unpack_inputs(packed_inputs())


def compare(flags: dict[str, Any]) -> dict[str, Any]:
    from megatron_moe.moe.metrics import collect_aux_losses

    flags = {"moe_aux_loss_coeff": 0.2} | MARGIN | flags
    run = tiny_run(vocab_size=100, num_layers=1, expert_interval=1, num_experts=(E,), mlp_type="standard", **flags)
    router = built_router(**flags)
    probe = torch.randn(N, E, generator=torch.Generator().manual_seed(8))
    x = hidden_states().requires_grad_()
    probs, routing_map = router(x)
    ours = torch.autograd.grad((probs * probe).sum(), [x, router.weight])
    load = router.take_load().int().tolist()
    reported = collect_aux_losses(1, 1, 1)
    beta = run.routing.router_margin_beta * run.routing.router_margin_beta_decay**STEP
    x64 = x.detach().double().requires_grad_()
    w64 = router.weight.detach().double().requires_grad_()
    expected, chosen, extra = naive(x64, w64, run, max(beta, run.routing.router_margin_beta_min))
    theirs = torch.autograd.grad((expected * probe).sum() + extra, [x64, w64])
    plain = router.eval()(x)[1]
    pairs = zip((probs, *ours), (expected, *theirs), strict=True)
    return {
        "errors": [float((a - b).abs().max() / b.abs().max()) for a, b in pairs],
        "map": bool(torch.equal(routing_map, chosen)),
        "load": load,
        "expected load": [*chosen.sum(dim=0).tolist(), 0, 0],
        "moved": int((chosen & ~plain).sum()),
        "margin loss": reported.get("margin_loss"),
        "balance": reported.get("load_balancing_loss"),
        "extra": float(extra) / N,
    }


def compare_all() -> dict[str, dict[str, Any]]:
    start()
    return {name: compare(flags) for name, flags in CASES.items()}


@pytest.fixture(scope="module")
def compared() -> dict[str, dict[str, Any]]:
    return run_ranks(1, compare_all)[0]


@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop_over_tokens(name: str, compared: dict[str, dict[str, Any]]) -> None:
    """Weights, map, load, and the gradients of weights, balancing loss and margin loss together."""
    result = compared[name]
    assert max(result["errors"]) < 2e-6
    assert result["map"]
    assert result["load"] == result["expected load"]
    if name.startswith("elsayed"):
        assert result["moved"] == 0, "the choice is the plain one"
        reported = 0.3 * result["margin loss"] + 0.2 * result["balance"]
        assert reported == pytest.approx(result["extra"], rel=1e-6)
    else:
        assert result["moved"] > 0, "the margin moves no token: this test proves nothing"
        assert result["margin loss"] is None


# ---- margin 1, evaluation, precision


def plain_and_margined() -> dict[str, Any]:
    """Margin 1 beside plain top-k; evaluation; the half-precision module; what recompute's two passes see."""
    start()
    x = hidden_states()
    found: dict[str, Any] = {}

    def outcome(router: Any) -> list[Tensor]:
        y = x.clone().requires_grad_()
        probs, routing_map = router(y)
        probe = torch.linspace(-1, 1, N * E).view(N, E)
        return [probs, routing_map, *torch.autograd.grad((probs * probe).sum(), [y, router.weight])]

    for name, flags in {"m = 1": {"router_margin": 1.0}, "additive 0": ADDITIVE | {"router_margin": 0.0}}.items():
        for kind, extra in {"top-1": {}, "top-2": TOP2, "gate": {"router_margin_gate": True}}.items():
            plain = built_router(**{key: value for key, value in extra.items() if key != "router_margin_gate"})
            ours = built_router(**MARGIN | flags | extra)
            pairs = zip(outcome(ours), outcome(plain), strict=True)
            found[f"{name}, {kind}"] = all(torch.equal(a, b) for a, b in pairs)
    for name, flags in {"lsoftmax": NEAR, "additive": ADDITIVE, "elsayed": ELSAYED}.items():
        pairs = zip(outcome(built_router(**MARGIN | flags).eval()), outcome(built_router().eval()), strict=True)
        found[f"{name}, evaluation"] = all(torch.equal(a, b) for a, b in pairs)
        differ = zip(outcome(built_router(**MARGIN | flags)), outcome(built_router()), strict=True)
        found[f"{name}, training"] = not all(torch.equal(a, b) for a, b in differ)
    options = SIGMOID | TOP2 | {"moe_router_num_groups": 2, "moe_router_group_topk": 1}
    options |= {"moe_router_enable_expert_bias": True, "moe_router_topk_scaling_factor": 2.5}
    ours, plain = built_router(**MARGIN | NEAR | options), built_router(**options)
    for router in (ours, plain):
        router.expert_bias.copy_(torch.linspace(-0.2, 0.2, E))
    probs, routing_map = ours(x)
    logits = ours.gating(x).view(N, E)
    wanted = plain.routing(ours.scored(logits, B).view(S, B, E))[1]
    scores = torch.sigmoid(logits) * wanted
    found["groups, bias: chosen with the margin"] = torch.equal(routing_map, wanted)
    found["groups, bias: not as without"] = not torch.equal(routing_map, plain(x)[1])
    found["groups, bias: weighed without"] = torch.allclose(probs, 2.5 * scores / scores.sum(dim=1, keepdim=True))
    half = built_router(**MARGIN, bf16=True)
    half.begin_step(7)
    found["half"] = [half.weight.dtype == torch.bfloat16, half.margin_beta.dtype == torch.float32]
    found["half"].append(half.margin_beta.item() == np.float32(100 * 0.99**7))
    found["half"].append(half(x.bfloat16())[0].dtype == torch.float32)
    kept = half.bfloat16().margin_beta
    found["half"].append(kept.dtype == torch.float32 and kept.item() == np.float32(100 * 0.99**7))
    found["half"].append("margin_beta" in half.state_dict())
    router = built_router(**MARGIN | NEAR)
    with torch.no_grad():
        first = router(x)[1]
    found["both passes choose alike"] = bool(torch.equal(first, router(x)[1]))
    return found


def test_without_a_margin_and_outside_of_training_it_is_plain_top_k() -> None:
    found = run_ranks(1, plain_and_margined)[0]
    assert found.pop("half") == [True] * 6
    assert len(found) == 16
    assert {name: value for name, value in found.items() if not value} == {}


def test_margin_one_trains_bit_for_bit_like_top_k(tiny_data: Path) -> None:
    """Three steps with dropout and top-2: losses, norms, loads and the last gradients."""
    flags = data_flags(tiny_data) | TOP2 | {"hidden_dropout": 0.1}
    plain, ours = (
        run_ranks(1, train_and_gather, tiny_run(**flags | extra))[0] for extra in ({}, MARGIN | {"router_margin": 1.0})
    )
    assert ours[:2] == plain[:2]
    assert ours.loads == plain.loads
    gradients = assemble([ours.gradients])
    assert len([key for key in list(gradients) if key.endswith("margin_beta") and gradients.pop(key) is not None]) == 2
    for key, expected in assemble([plain.gradients]).items():
        np.testing.assert_array_equal(gradients.pop(key), expected, err_msg=key)
    assert not gradients


# ---- whole runs

# Six experts do not divide a rank's part of a sequence: round robin has to know where in the micro-batch it stands.
RUNS: dict[str, dict[str, Any]] = {
    "lsoftmax, annealed": MARGIN | {"router_margin_beta": 1.0, "router_margin_beta_decay": 0.5, "num_experts": (4, 6)},
    "balanced, gate, top-2": MARGIN | NEAR | TOP2 | {"router_margin_target": "balanced", "router_margin_gate": True},
    "elsayed": MARGIN | ELSAYED,
}


@pytest.fixture(scope="module")
def alone(tiny_data: Path) -> dict[str, Trained]:
    return {name: one_process(tiny_data, flags) for name, flags in RUNS.items()}


TENSOR_CONTEXT, PIPELINE_DATA, _ = LAYOUTS


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("lsoftmax, annealed", TENSOR_CONTEXT),
        ("balanced, gate, top-2", TENSOR_CONTEXT),
        ("elsayed", TENSOR_CONTEXT),
        ("elsayed", PIPELINE_DATA),
    ],
)
def test_layouts_and_recompute_agree(name: str, layout: str, alone: dict[str, Trained], tiny_data: Path) -> None:
    """beta, which is among the buffers that are compared, included."""
    assert_layout_agrees(layout, alone[name], tiny_data, RUNS[name])


def test_recompute_leaves_beta_alone(tiny_data: Path, alone: dict[str, Trained]) -> None:
    flags = RUNS["lsoftmax, annealed"]
    again = one_process(tiny_data, flags | FULL)
    for result in (again, alone["lsoftmax, annealed"]):
        betas = [tensor for key, tensor in assemble([result.gradients]).items() if key.endswith("margin_beta")]
        assert [beta.tolist() for beta in betas] == [[0.25], [0.25]]
    assert again.losses == pytest.approx(alone["lsoftmax, annealed"].losses, rel=1e-6)


def test_margin_loss_is_reported(tiny_data: Path, tmp_path: Path) -> None:
    """As `moe_margin_loss`, the same from all stages, replicas and parts of a sequence."""
    rows = []
    for ranks, sizes in ((1, {}), (4, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2})):
        flags = data_flags(tiny_data) | MARGIN | ELSAYED | sizes | {"train_iters": 1, "tensorboard": False}
        run_ranks(ranks, train_curve, tiny_run(**flags, save=str(tmp_path / str(ranks))))
        rows.append(json.loads((tmp_path / str(ranks) / "metrics.jsonl").read_text(encoding="utf-8")))
    alone, four = rows
    assert 0 < alone["moe_margin_loss"] < 0.6
    assert four["moe_margin_loss"] == pytest.approx(alone["moe_margin_loss"], rel=1e-5)
    assert alone["moe_aux_loss"] == pytest.approx(1.0, abs=0.1)


def saved_beta(run: Any) -> list[float]:
    """The beta of every layer, as a trainer finds it in a checkpoint."""
    from tests.helpers.training import build_trainer

    model = build_trainer(run).model
    return [buffer.item() for chunk in model for name, buffer in chunk.named_buffers() if name.endswith("margin_beta")]


def test_anneal_goes_on_bit_for_bit(tiny_data: Path, tmp_path: Path) -> None:
    flags = RUNS["lsoftmax, annealed"]
    result = resume(tiny_data, tmp_path, flags)
    assert_resumes_bit_for_bit(result)
    found = run_ranks(1, saved_beta, tiny_run(**data_flags(tiny_data), **flags, train_iters=4, load=str(tmp_path)))[0]
    assert found == [0.5, 0.5], "of step 1, the last before the checkpoint"
    # It matters: a beta that started again at the checkpoint would show.
    slower = flags | {"router_margin_beta_decay": 1.0, "tensorboard": False}
    other = run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data) | slower, train_iters=4))[0]
    assert other.losses[0] == result.whole.losses[0]
    assert other.losses[2:] != result.whole.losses[2:]


# ---- flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"router_margin": 2.5}, "--router-margin 2.5: must be 1, 2, 3 or 4 with --router-margin-type lsoftmax"),
        ({"router_margin": 5.0}, "--router-margin 5.0: must be 1, 2, 3 or 4"),
        (ADDITIVE | {"router_margin": 1.0}, r"--router-margin 1.0: must be in \[0, 1\)"),
        ({"router_margin_type": "elsayed", "router_margin": 0.0}, "--router-margin 0.0: must be greater than 0"),
        (ADDITIVE | {"router_margin_scale": 0.0}, "--router-margin-scale 0.0: must be greater than 0"),
        (ADDITIVE | {"router_margin_beta": 7.0}, "--router-margin-beta 7.0: belongs to --router-margin-type lsoftmax"),
        ({"router_margin_scale": 7.0}, "--router-margin-scale 7.0: belongs to --router-margin-type additive"),
        ({"router_margin_loss_coeff": 0.5}, "--router-margin-loss-coeff 0.5: belongs to --router-margin-type elsayed"),
        (ELSAYED | {"router_margin_gate": True}, "--router-margin-gate True: belongs to --router-margin-type lsoftmax"),
        (
            {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0},
            "--router large-margin: cannot be combined with --moe-router-load-balancing-type sinkhorn",
        ),
        (
            {"router": "topk", "router_margin": 3.0},
            "--router-margin 3.0: belongs to --router large-margin, not to topk",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_run(**MARGIN | flags), 1)


def test_a_checkpoint_of_another_scale_is_refused(tmp_path: Path) -> None:
    """Its logits mean something else, outside of training too; the margin itself may change."""
    from megatron_moe.checkpoint.load import check_same_model

    flags = MARGIN | ADDITIVE | {"vocab_size": 100}
    save_run(tiny_run(**flags, router_margin_scale=4.0), tmp_path / "config.yaml")
    check_same_model(tiny_run(**flags, router_margin_scale=4.0, router_margin=0.3), tmp_path)
    with pytest.raises(UserError, match=r"--router-margin-scale None: the checkpoint .* was written with 4\.0"):
        check_same_model(tiny_run(**flags), tmp_path)


# ---- scoring and generation


def inference(folder: str) -> list[Any]:
    """Logits and a continuation with the checkpoint's routers, then with plain ones of the same weights."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_moe.config.parallel import ParallelConfig
    from megatron_moe.inference.generation import generate
    from megatron_moe.inference.model import load_for_inference
    from megatron_moe.inference.options import SamplingOptions
    from megatron_moe.moe.layer import moe_layers
    from megatron_moe.moe.routers.large_margin import LargeMarginRouter
    from megatron_moe.moe.routers.topk import TopKRouter

    model = load_for_inference(folder, ParallelConfig(device="cpu"))
    prompts = [model.tokenizer.encode("工程师写完了一封信。")] * 2

    def outcome() -> list[Any]:
        logits = model.logits(prompts).tolist()
        return [logits, generate(model, prompts, SamplingOptions(greedy=True), max_new_tokens=5, micro_batch_size=2)]

    ours = outcome()
    for layer in moe_layers(model._chunk):
        assert type(layer.router) is LargeMarginRouter
        plain = TopKRouter(layer.config, get_default_pg_collection()).eval()
        plain.weight.data.copy_(layer.router.weight)
        layer.router = plain
    return [ours, outcome()]


def test_scores_and_generates_like_plain_top_k(tiny_data: Path, tmp_path: Path) -> None:
    run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data) | MARGIN | NEAR, save=str(tmp_path), tensorboard=False))
    ours, plain = run_ranks(1, inference, str(tmp_path))[0]
    assert ours == plain
