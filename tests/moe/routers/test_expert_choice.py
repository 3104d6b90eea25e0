"""`expert-choice`: experts take their best tokens in training, and those above a cutoff, token by token, elsewhere."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_moe.config.base import ConfigError
from megatron_moe.config.validate import validate
from megatron_moe.moe.inputs import RoutingInputs
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble
from tests.helpers.sharing import (
    LAYOUTS,
    Compared,
    E,
    N,
    Routes,
    assert_equals_the_loop,
    assert_layout_agrees,
    assert_resumes_bit_for_bit,
    build_layer,
    compare,
    hidden_states,
    one_process,
    packed_inputs,
    resume,
    start,
)
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve
from tests.inference import on_ranks

FLAGS: dict[str, Any] = {"router": "expert-choice", "moe_router_topk": 2}
# Flags, and how many tokens each expert takes.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "2 experts a token": ({}, 16),
    "1 expert a token, allgather": ({"moe_router_topk": 1, "moe_token_dispatcher_type": "allgather"}, 8),
    "capacity factor": ({"moe_expert_capacity_factor": 1.3}, 21),
    "minimum": ({"moe_router_topk": 1, "moe_expert_capacity_factor": 0.1, "moe_min_capacity": 3}, 3),
    "all tokens": ({"moe_expert_capacity_factor": 9.0}, N),
    "7 experts": ({"num_experts": (7,)}, 10),
}


def taken(probs_NE: Tensor, capacity: int) -> list[list[int]]:
    """Experts of every token: each expert's most probable tokens, of equal ones the first."""
    experts_of: list[list[int]] = [[] for _ in probs_NE]
    for expert in range(probs_NE.shape[1]):
        ranked = sorted(range(len(experts_of)), key=lambda token: -float(probs_NE[token, expert]))
        for token in ranked[:capacity]:
            experts_of[token].append(expert)
    return experts_of


def weighed(probs_NE: Tensor, experts_of: list[list[int]]) -> Routes:
    return [[(expert, probs_NE[token, expert]) for expert in mine] for token, mine in enumerate(experts_of)]


def by_experts(capacity: int) -> Callable[[Tensor, RoutingInputs], Routes]:
    def route(logits_NE: Tensor, _: RoutingInputs) -> Routes:
        probs_NE = torch.softmax(logits_NE, dim=1)
        return weighed(probs_NE, taken(probs_NE, capacity))

    return route


def by_cutoff(cutoff: list[float]) -> Callable[[Tensor, RoutingInputs], Routes]:
    def route(logits_NE: Tensor, _: RoutingInputs) -> Routes:
        probs_NE = torch.softmax(logits_NE, dim=1)
        return weighed(probs_NE, [[e for e, p in enumerate(row) if p >= cutoff[e]] for row in probs_NE.tolist()])

    return route


def compare_all() -> dict[str, Any]:
    start()
    results: dict[str, Any] = {}
    for name, (flags, capacity) in CASES.items():
        layer = build_layer(**FLAGS | flags)
        results[name] = compare(layer, by_experts(capacity))
        experts = layer.router.num_experts
        cutoff = [float(c) for c in torch.linspace(0.1, 0.5, experts)]
        layer.router.cutoffs.copy_(torch.tensor(cutoff))
        results[f"{name}, evaluation"] = compare(layer.eval(), by_cutoff(cutoff))
    return results


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return run_ranks(1, compare_all)[0]


@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop(name: str, compared: dict[str, Any]) -> None:
    result: Compared = compared[name]
    assert_equals_the_loop(result)
    flags, capacity = CASES[name]
    assert result.load[:-2] == [capacity] * flags.get("num_experts", (E,))[0]
    assert result.load[-1] == 0
    assert result.load[-2] == result.alone, "tokens that no expert took are counted"
    assert (result.alone > 0) == (name in ("1 expert a token, allgather", "minimum"))


@pytest.mark.parametrize("name", CASES)
def test_takes_what_is_above_the_cutoff_outside_of_training(name: str, compared: dict[str, Any]) -> None:
    result: Compared = compared[f"{name}, evaluation"]
    assert {key: error for key, error in result.errors.items() if not error < 5e-6} == {}
    assert sum(result.load) == 0, "evaluation is not counted"
    assert 0 < sum(result.expected_load) < N * len(result.expected_load)
    assert len(set(result.expected_load)) > 1


# ---- the cutoffs


def cutoffs() -> dict[str, Any]:
    """Buffers after steps of several micro-batches, some recomputed, evaluated or skipped, beside the formula."""
    import torch.distributed as dist

    start()
    layer = build_layer(perturbed=False, **FLAGS, router_cutoff_decay=0.7)
    router = layer.router
    capacity = math.ceil(N * 2 / E)
    expected = torch.full((E,), 1.0 / E)
    rows = [[router.cutoffs.tolist(), expected.tolist(), int(router.cutoff_steps)]]

    def lowest(x: Tensor) -> Tensor:
        probs_NE = torch.softmax(x.reshape(N, -1) @ router.weight.T, dim=1)
        return probs_NE.sort(dim=0, descending=True).values[capacity - 1].detach()

    for step in range(6):
        micro_batches = [hidden_states(seed=100 * step + i) for i in range(3)]
        for x in micro_batches:
            # A first pass under recompute; of other tokens, which would show in the mean.
            with torch.no_grad():
                layer(hidden_states(seed=2), padding_mask=packed_inputs())
            layer(x, padding_mask=packed_inputs())
        layer.eval()(hidden_states(seed=1))
        layer.train()
        skipped = step == 3
        router.finish_step(dist.group.WORLD, skipped=skipped)
        if not skipped:
            count = int(router.cutoff_steps)
            # The plain mean of the first steps, until 1 / count is less than 1 - 0.7.
            rate = [1.0, 1 / 2, 1 / 3, 0.3, 0.3][count - 1]
            expected = (1 - rate) * expected + rate * torch.stack([lowest(x) for x in micro_batches]).mean(dim=0)
        rows.append([router.cutoffs.tolist(), expected.tolist(), int(router.cutoff_steps)])
    return {"rows": rows}


def test_cutoffs_are_the_running_mean_of_the_lowest_probability_taken() -> None:
    rows = run_ranks(1, cutoffs)[0]["rows"]
    for ours, formula, _ in rows:
        assert ours == pytest.approx(formula, rel=1e-5)
    assert [count for *_, count in rows] == [0, 1, 2, 3, 3, 4, 5]
    assert rows[1][0] != rows[2][0]
    assert rows[4][0] == rows[3][0], "a skipped step moved them"


def conversions() -> list[Any]:
    start()
    layer = build_layer(**FLAGS)
    values = torch.tensor([0.1, 0.2, 0.3, 1 / 3])
    layer.router.cutoffs.copy_(values)
    layer.bfloat16()
    router = layer.router
    return [
        str(router.cutoffs.dtype),
        str(router.cutoff_sums.dtype),
        str(router.cutoff_steps.dtype),
        str(router.weight.dtype),
        torch.equal(router.cutoffs, values),
        sorted(name for name in layer.state_dict() if "cutoff" in name),
    ]


def test_cutoffs_stay_fp32_in_a_bf16_model() -> None:
    expected = ["torch.float32", "torch.float32", "torch.int64", "torch.bfloat16", True]
    assert run_ranks(1, conversions)[0] == [*expected, ["router.cutoff_steps", "router.cutoffs"]]


def z_loss() -> list[float]:
    """Value and formula, and the error of the gate's gradient."""
    from megatron_moe.moe.metrics import collect_aux_losses

    start()
    layer = build_layer(**FLAGS, moe_z_loss_coeff=0.1)
    weight = layer.router.weight
    x = hidden_states()
    out, _ = layer(x, padding_mask=packed_inputs())
    (gradient,) = torch.autograd.grad(out.sum() * 0.0, weight)
    formula = torch.logsumexp(x @ weight.T, dim=-1).square().mean()
    # Losses are summed over tokens, to be divided by their number at the end of the step.
    (expected,) = torch.autograd.grad(formula * 0.1 * N, weight)
    error = (gradient - expected).abs().max() / expected.abs().max()
    return [collect_aux_losses(1, 1, 1)["z_loss"], float(formula.detach()), float(error)]


def test_z_loss_equals_its_formula() -> None:
    measured, formula, error = run_ranks(1, z_loss)[0]
    assert measured == pytest.approx(formula, rel=1e-5)
    assert error < 1e-4


def nobody() -> list[float]:
    """Outputs and the input's gradient where no expert takes any token."""
    start()
    results = []
    for dispatcher in ("alltoall", "allgather"):
        layer = build_layer(**FLAGS, moe_token_dispatcher_type=dispatcher).eval()
        layer.router.cutoffs.fill_(2.0)
        x = hidden_states().requires_grad_()
        out, _ = layer(x)
        out.sum().backward()
        assert x.grad is not None
        results += [float(out.abs().max()), float(x.grad.abs().max())]
    return results


def test_no_expert_may_take_any_token() -> None:
    assert run_ranks(1, nobody)[0] == [0.0, 0.0, 0.0, 0.0]


# ---- runs


@pytest.fixture(scope="module")
def alone(tiny_data: Path) -> Trained:
    return one_process(tiny_data, FLAGS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, alone: Trained, tiny_data: Path) -> None:
    """The cutoffs too: they are among what `assert_layout_agrees` puts together from all ranks."""
    assert alone.loads == {2: [128] * 4, 4: [64] * 8}
    whole = assemble([alone.gradients])
    names = sorted(key for key in whole if key.endswith("cutoffs"))
    assert [whole[name].shape[-1] for name in names] == [4, 8]
    assert all(0 < float(whole[name].min()) <= float(whole[name].max()) < 1 for name in names)
    assert_layout_agrees(layout, alone, tiny_data, FLAGS)


def test_resumes_bit_for_bit(tiny_data: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"bf16": True, "eval_interval": 1, "eval_iters": 1}
    result = resume(tiny_data, tmp_path, flags)
    assert_resumes_bit_for_bit(result)
    # They depend on the cutoffs of the steps before.
    assert result.rest.evaluations == result.whole.evaluations[2:]


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with weights large enough that experts differ."""
    folder = tmp_path_factory.mktemp("run")
    shape = {"train_iters": 3, "init_method_std": 0.4, "max_position_embeddings": 48}
    run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data), **FLAGS, **shape, save=str(folder)))
    return folder


def test_scores_are_those_of_a_plain_forward_pass_alone_and_in_batches(trained: Path) -> None:
    plain, alone, batched = run_ranks(1, on_ranks.plain_scores, trained)[0]
    for rows in (alone, batched):
        for row, expected in zip(rows, plain, strict=True):
            np.testing.assert_allclose(row, expected, atol=2e-5, rtol=2e-5)


def test_cached_generation_equals_uncached(trained: Path) -> None:
    ways = run_ranks(1, on_ranks.greedy_ways, trained)[0]
    for name, texts in ways.items():
        assert texts == ways["plain"], name


def logits_and_load(run_dir: Path, sizes: dict[str, int]) -> tuple[Any, list[list[int]]]:
    """Logits of two texts, and how many experts took each token in every layer."""
    from megatron_moe.moe.layer import moe_layers

    model = on_ranks.load(run_dir, sizes)
    counts: list[list[int]] = []
    for layer in moe_layers(model._chunk):
        layer.router.register_forward_hook(lambda _, __, out: counts.append(out[1].sum(dim=1).tolist()))
    prompts = on_ranks.prompts_of(model)
    return model.logits([prompts[1], prompts[1][::-1]]).numpy(), counts


def test_layouts_score_alike_with_any_number_of_experts_a_token(trained: Path) -> None:
    logits, counts = run_ranks(1, logits_and_load, trained, {})[0]
    assert len({count for layer in counts for count in layer}) > 1
    for sizes in (
        {"expert_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ):
        for other, _ in run_ranks(2, logits_and_load, trained, sizes):
            np.testing.assert_allclose(other, logits, atol=2e-5 * np.abs(logits).max())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"moe_aux_loss_coeff": 0.1}, "--moe-aux-loss-coeff 0.1: has no meaning for --router expert-choice"),
        (
            {"moe_token_drop_policy": "random", "moe_expert_capacity_factor": 1.0},
            "--moe-token-drop-policy random: has no meaning for --router expert-choice",
        ),
        (
            {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"},
            "--moe-router-score-function sigmoid: has no meaning for --router expert-choice",
        ),
        (
            {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.0},
            "--moe-pad-expert-input-to-capacity True: has no meaning for --router expert-choice",
        ),
        (
            {"moe_token_dispatcher_type": "flex"},
            "--moe-token-dispatcher-type flex: must be alltoall or allgather with --router expert-choice",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_run(**FLAGS | flags, vocab_size=100, train_iters=1), 1)
