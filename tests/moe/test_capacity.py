"""Capacity with a minimum, random token selection, RSample and jitter, against loops; and which layouts agree.

A rank counts its own tokens, as upstream does, so a capacity is compared under layouts that leave a micro-batch whole;
noise belongs to tokens, so it is compared under all.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config.aliases import translate
from megatron_moe.config.base import ConfigError
from megatron_moe.config.validate import validate
from megatron_moe.moe.capacity import (
    expert_capacity,
    keep_within_capacity,
    priority_at_random,
    priority_by_position,
)
from megatron_moe.moe.inputs import RoutingInputs, unpack_inputs
from megatron_moe.moe.token_random import token_expert_uniform
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained
from tests.helpers.sharing import (
    FULL,
    LAYOUTS,
    B,
    Compared,
    E,
    H,
    N,
    Routes,
    S,
    assert_equals_the_loop,
    assert_layout_agrees,
    build_layer,
    compare,
    hidden_states,
    one_process,
    packed_inputs,
    start,
)
from tests.helpers.tiny import tiny_run

RANDOM = {"moe_token_drop_policy": "random", "moe_expert_capacity_factor": 0.5}
RSAMPLE = {"moe_router_noise": "rsample"}
TOP2 = {"moe_router_topk": 2}
NO_AUX = {"moe_aux_loss_coeff": 0.0}


# ---- the rules


def test_capacity_is_its_formula() -> None:
    for tokens, topk, experts, factor, minimum in [(32, 1, 4, 0.5, 0), (32, 2, 8, 1.1, 0), (32, 1, 4, 0.1, 4)]:
        expected = max(math.ceil(tokens * topk / experts * factor), minimum)
        assert expert_capacity(tokens, topk, experts, factor, minimum) == expected
    assert expert_capacity(32, 1, 4, 9.0) == 32, "never more than the tokens there are"
    assert expert_capacity(3, 1, 4, 1.0, 4) == 3


def all_to_one(tokens: int) -> tuple[Tensor, RoutingInputs]:
    """Every token wants expert 1 of 3; places of one sample."""
    map_NE = torch.zeros(tokens, 3, dtype=torch.bool)
    map_NE[:, 1] = True
    place = torch.arange(tokens)
    return map_NE, RoutingInputs(place, place, torch.full_like(place, 7), torch.zeros_like(place))


def test_position_keeps_the_first() -> None:
    map_NE, _ = all_to_one(12)
    kept = keep_within_capacity(map_NE, priority_by_position(map_NE), 4, padded=False)
    assert kept.nonzero().tolist() == [[token, 1] for token in range(4)]


def test_random_selection_favours_nobody() -> None:
    """12 tokens, 4 places, 3,000 steps: each is kept 1,000 times, give or take 26 (one standard deviation)."""
    map_NE, inputs = all_to_one(12)
    times = torch.zeros(12)
    for step in range(3000):
        kept = keep_within_capacity(map_NE, priority_at_random(map_NE, inputs, 1, 2, step, 3), 4, padded=False)
        assert kept.sum() == 4
        assert (kept <= map_NE).all()
        times += kept[:, 1]
    assert times.min() > 1000 - 4 * 26
    assert times.max() < 1000 + 4 * 26


def test_random_selection_is_of_its_step_layer_and_seed() -> None:
    map_NE, inputs = all_to_one(12)

    def kept(*keys: int) -> Tensor:
        return keep_within_capacity(map_NE, priority_at_random(map_NE, inputs, *keys), 4, padded=False)

    first = kept(1, 2, 3, 4)
    assert torch.equal(kept(1, 2, 3, 4), first)
    assert not any(torch.equal(kept(*keys), first) for keys in [(2, 2, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)])


def test_padding_fills_every_expert_and_drops_no_more() -> None:
    map_NE, inputs = all_to_one(12)
    priority = priority_at_random(map_NE, inputs, 1, 2, 3, 4)
    padded = keep_within_capacity(map_NE, priority, 4, padded=True)
    assert padded.sum(dim=0).tolist() == [4, 4, 4]
    assert torch.equal(padded & map_NE, keep_within_capacity(map_NE, priority, 4, padded=False))


# ---- in a layer


def limited(wanted: list[list[int]], priority: Any, capacity: int) -> list[set[int]]:
    """The tokens that each expert keeps; `priority(token, expert)`, the highest first."""
    kept = []
    for expert in range(E):
        tokens = [token for token, experts in enumerate(wanted) if expert in experts]
        kept.append(set(sorted(tokens, key=lambda token, expert=expert: -priority(token, expert))[:capacity]))
    return kept


STEP, SEED, LAYER = 5, 1234, 1


def layer_of(**flags: Any) -> Any:
    layer = build_layer(**NO_AUX | flags)
    layer.router.begin_step(STEP)
    assert layer.router._random_keys(9) == (SEED, 9, STEP, LAYER)
    return layer


def weights_of(logits: Tensor, chosen: list[int]) -> Tensor:
    """Top-1: the softmax over all experts; top-2: over the two."""
    return torch.softmax(logits, dim=0)[chosen] if len(chosen) == 1 else torch.softmax(logits[chosen], dim=0)


def capacity_layer(topk: int, minimum: int, padded: bool) -> Compared:
    """Random token selection."""
    flags = {"moe_router_topk": topk, "moe_min_capacity": minimum, "moe_pad_expert_input_to_capacity": padded}

    def route(logits: Tensor, inputs: RoutingInputs) -> Routes:
        wanted = [row.topk(topk).indices.tolist() for row in logits]
        draw = token_expert_uniform(inputs, E, SEED, 2, STEP, LAYER)
        capacity = max(math.ceil(N * topk / E * 0.5), minimum)
        kept = limited(wanted, lambda token, expert: float(draw[token, expert]), capacity)
        return [
            [
                (expert, weight)
                for expert, weight in zip(chosen, weights_of(row, chosen), strict=True)
                if token in kept[expert]
            ]
            for token, (row, chosen) in enumerate(zip(logits, wanted, strict=True))
        ]

    return compare(layer_of(**RANDOM | flags), route)


def noisy_layer(topk: int) -> Compared:
    """RSample: chosen with noise, weighed without."""

    def route(logits: Tensor, inputs: RoutingInputs) -> Routes:
        gumbel = -torch.log(-torch.log(token_expert_uniform(inputs, E, SEED, 1, STEP, LAYER)))
        chosen = [row.topk(topk).indices.tolist() for row in logits.detach().double() + gumbel]
        assert any(c[0] != int(row.argmax()) for c, row in zip(chosen, logits, strict=True))
        return [
            list(zip(experts, weights_of(row, experts), strict=True))
            for row, experts in zip(logits, chosen, strict=True)
        ]

    return compare(layer_of(**RSAMPLE | {"moe_router_topk": topk}), route)


def layers() -> dict[str, Any]:
    from megatron_moe.moe.metrics import collect_aux_losses

    start()
    found: dict[str, Any] = {
        "random": capacity_layer(1, 0, False),
        "random, top-2": capacity_layer(2, 0, False),
        "random, padded": capacity_layer(2, 0, True),
        "minimum": capacity_layer(1, 6, False),
        "rsample": noisy_layer(1),
        "rsample, top-2": noisy_layer(2),
    }
    router, x = layer_of(**RSAMPLE).router, hidden_states()
    router.inputs = unpack_inputs(packed_inputs())
    times = torch.zeros(N, E)
    with torch.no_grad():
        for step in range(2000):
            router.begin_step(step)
            times += router(x)[1]
        found["frequency"] = (times / 2000, torch.softmax(router.gating(x).view(N, E), dim=1))
        found["evaluation"] = torch.equal(router.eval()(x)[1], layer_of().router.eval()(x)[1])
    router = layer_of(**RSAMPLE | TOP2 | {"moe_aux_loss_coeff": 0.1}).router
    router.inputs = unpack_inputs(packed_inputs())
    share = router(x)[1].float().mean(dim=0) / 2
    mean = torch.softmax(router.gating(x).view(N, E), dim=1).mean(dim=0)
    found["balance"] = (collect_aux_losses(1, 1, 1)["load_balancing_loss"], float(E * (share * mean).sum()))
    router = layer_of(moe_input_jitter_eps=0.1).router
    router.inputs = unpack_inputs(packed_inputs())
    found["jitter"] = router.apply_input_jitter(torch.ones(S, B, H))
    found["jitter again"] = router.apply_input_jitter(torch.ones(S, B, H, dtype=torch.bfloat16))
    router.begin_step(STEP + 1)
    found["next jitter"] = router.apply_input_jitter(torch.ones(S, B, H))
    found["no jitter"] = router.eval().apply_input_jitter(torch.ones(S, B, H))
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return run_ranks(1, layers)[0]


@pytest.mark.parametrize("name", ["random", "random, top-2", "random, padded", "minimum"])
def test_random_selection_equals_a_loop(name: str, measured: dict[str, Any]) -> None:
    result = measured[name]
    assert_equals_the_loop(result)
    capacity = {"minimum": 6}.get(name, math.ceil(N * (2 if "2" in name or "padded" in name else 1) / E * 0.5))
    assert max(result.load[:-2]) == capacity, "no expert was full: this test proves nothing"
    assert result.load[-2] == N * (2 if "2" in name or "padded" in name else 1) - sum(result.load[:-2]) > 0


@pytest.mark.parametrize("name", ["rsample", "rsample, top-2"])
def test_rsample_equals_a_loop(name: str, measured: dict[str, Any]) -> None:
    assert_equals_the_loop(measured[name])


def test_rsample_draws_experts_with_their_probability(measured: dict[str, Any]) -> None:
    """2,000 steps: a standard deviation is 0.011 at most."""
    got, expected = measured["frequency"]
    assert (got - expected).abs().max() < 0.05
    assert (got - expected).square().mean().sqrt() < 0.012
    assert measured["evaluation"]


def test_balancing_loss_counts_where_the_noise_sends_tokens(measured: dict[str, Any]) -> None:
    """As in the released code: shares with the noise, mean probabilities without."""
    reported, expected = measured["balance"]
    assert reported == pytest.approx(expected, rel=1e-5)


def test_jitter_is_uniform_and_belongs_to_token_step_and_training(measured: dict[str, Any]) -> None:
    jitter = measured["jitter"]
    assert jitter.min() >= 0.9
    assert jitter.max() <= 1.1
    assert jitter.mean().item() == pytest.approx(1.0, abs=0.01)
    assert jitter.var().item() == pytest.approx(0.2**2 / 12, rel=0.1)
    assert jitter.unique().numel() > 0.99 * jitter.numel()
    assert torch.equal(measured["jitter again"], jitter), "in fp32, whatever the input's type"
    assert not torch.equal(measured["next jitter"], jitter)
    assert torch.equal(measured["no jitter"], torch.ones(S, B, H))


# ---- whole runs

NOISY = RSAMPLE | TOP2 | {"moe_input_jitter_eps": 0.05}
# A rank of this layout has whole micro-batches.
WHOLE = list(LAYOUTS)[1]


@pytest.fixture(scope="module")
def noisy(tiny_data: Path) -> Trained:
    return one_process(tiny_data, NOISY)


def test_noise_is_the_same_where_a_rank_has_parts_of_a_sequence(noisy: Trained, tiny_data: Path) -> None:
    """Other layouts: docs/equivalence.md."""
    assert_layout_agrees(next(iter(LAYOUTS)), noisy, tiny_data, NOISY)


def test_random_selection_is_the_same_where_micro_batches_are_whole(tiny_data: Path) -> None:
    flags = RANDOM | {"moe_min_capacity": 10}
    assert_layout_agrees(WHOLE, one_process(tiny_data, flags), tiny_data, flags)


def test_recompute_draws_the_same_numbers(noisy: Trained, tiny_data: Path) -> None:
    again = one_process(tiny_data, NOISY | FULL)
    assert again.losses == pytest.approx(noisy.losses, rel=1e-6)
    assert again.loads == noisy.loads


# ---- flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"moe_min_capacity": 4}, "--moe-min-capacity 4: needs --moe-expert-capacity-factor"),
        ({"moe_min_capacity": -1}, "--moe-min-capacity -1: must be at least 0"),
        ({"moe_token_drop_policy": "random"}, "--moe-token-drop-policy random: needs --moe-expert-capacity-factor"),
        (
            {"moe_min_capacity": 4, "moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
            "--moe-min-capacity 4: cannot be combined with --moe-pad-expert-input-to-capacity",
        ),
        (
            RSAMPLE | NO_AUX | {"moe_router_load_balancing_type": "sinkhorn"},
            "--moe-router-noise rsample: cannot be combined with --moe-router-load-balancing-type sinkhorn",
        ),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_run(**flags), 1)


def test_disabled_token_dropping_means_no_capacity() -> None:
    known = {"--moe-expert-capacity-factor"}
    assert translate(["--disable-moe-token-dropping"], known) == ["--moe-expert-capacity-factor", "none"]
