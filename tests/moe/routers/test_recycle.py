"""`recycle`: nobody is lost while there is room, nobody else is touched, and chance belongs to tokens, not to ranks."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config.base import ConfigError
from megatron_moe.config.validate import validate
from megatron_moe.moe.routers.recycle import recycled
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained
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
from tests.helpers.tiny import tiny_run

FLAGS: dict[str, Any] = {"router": "recycle", "moe_expert_capacity_factor": 1.0, "moe_aux_loss_coeff": 0.0}


# ---- the assignment


def draw(wanted: list[int], experts: int, capacity: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    count = len(wanted)
    return recycled(
        torch.tensor(wanted),
        experts,
        capacity,
        order_M=torch.randperm(count, generator=generator),
        token_M=torch.rand(count, generator=generator, dtype=torch.float64),
        place_F=torch.randperm(experts * capacity, generator=generator),
    ).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_lost_while_there_is_room_and_no_expert_has_too_many(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    experts, count = 2 + seed % 7, 1 + 5 * seed
    wanted = (torch.rand(count, generator=generator) ** 3 * experts).long().tolist()
    for capacity in (1, math.ceil(count / experts), count):
        got = draw(wanted, experts, capacity, seed)
        load = [got.count(expert) for expert in range(experts)]
        assert max(load) <= capacity
        assert got.count(-1) == max(0, count - capacity * experts)
        for expert in range(experts):
            kept = sum(1 for a, b in zip(wanted, got, strict=True) if a == b == expert)
            assert kept == min(capacity, wanted.count(expert)), "an expert with room must keep its own"


def test_free_places_are_drawn_equally_and_without_replacement() -> None:
    """Of 8 tokens 6 want expert 0, which has room for 3; experts 1, 2, 3 have 3, 2, 2 free places for the other 3."""
    wanted = [0] * 6 + [2, 3]
    counts = torch.zeros(4)
    draws = 300
    for seed in range(draws):
        for was, got in zip(wanted, draw(wanted, 4, 3, seed), strict=True):
            if was != got:
                counts[got] += 1
    expected = 3 * torch.tensor([0, 3, 2, 2]) / 7 * draws
    # Three draws of 7 without replacement have a variance of at most 3 * 3/7 * 4/7 * 4/6 < 0.5; five deviations.
    assert (counts - expected).abs().max() < 5 * math.sqrt(0.5 * draws)


def test_of_those_without_a_place_nobody_comes_first() -> None:
    """Five tokens want expert 0 and five expert 1, which take two each; expert 2 has room for two of the other six."""
    lost = torch.zeros(2)
    draws = 300
    for seed in range(draws):
        got = draw([0] * 5 + [1] * 5, 3, 2, seed)
        lost += torch.tensor([got[:5].count(-1), got[5:].count(-1)])
    # Four of six are lost, a variance of 6 * 1/2 * 1/2 * 4/6 * 2/5 = 0.4 a draw for either half; five deviations.
    assert lost.sum() == 4 * draws
    assert (lost - 2 * draws).abs().max() < 5 * math.sqrt(0.4 * draws)


# ---- the layer


def naive_routes(layer: Any, capacity: int, policy: str, logits_NE: Tensor, choice: list[int]) -> Routes:
    """Kept tokens by a loop; of the others only that they are somewhere else is known: `choice` says where."""
    probs_NE = torch.softmax(logits_NE, dim=1)
    wanted = logits_NE.argmax(dim=1).tolist()
    kept: set[int] = set()
    for expert in range(E):
        mine = [token for token in range(N) if wanted[token] == expert]
        if policy == "probs":
            mine.sort(key=lambda token: -float(probs_NE[token, expert]))
        kept |= set(mine[:capacity])
    routes: Routes = []
    for token in range(N):
        expert = choice[token]
        assert (expert == wanted[token]) == (token in kept), "others than the right ones are kept"
        routes.append([] if expert < 0 else [(expert, probs_NE[token, expert])])
    return routes


def compare_policy(policy: str, factor: float, **flags: Any) -> tuple[Compared, list[int], int]:
    layer = build_layer(**FLAGS | {"moe_expert_capacity_factor": factor, "moe_token_drop_policy": policy} | flags)
    choice: list[int] = []
    inner = layer.router.routing

    def noted(logits: Tensor, padding_mask: Any = None) -> tuple[Tensor, Tensor]:
        probs_NE, map_NE = inner(logits, padding_mask)
        assert int(map_NE.sum(dim=1).max()) == 1
        assert ((probs_NE > 0) == map_NE).all()
        choice[:] = [int(row.int().argmax()) if row.any() else -1 for row in map_NE]
        return probs_NE, map_NE

    layer.router.routing = noted
    capacity = max(math.ceil(N / E * factor), flags.get("moe_min_capacity", 0))
    result = compare(layer, lambda logits_NE, _: naive_routes(layer, capacity, policy, logits_NE, choice))
    return result, list(choice), capacity


POLICIES: dict[str, tuple[str, float, dict[str, Any]]] = {
    "probs": ("probs", 1.0, {}),
    "position": ("position", 1.0, {}),
    "probs, too few places": ("probs", 0.5, {}),
    "probs, allgather": ("probs", 0.5, {"moe_token_dispatcher_type": "allgather"}),
    "probs, 1.25": ("probs", 1.25, {}),
    "minimum": ("probs", 0.25, {"moe_min_capacity": 8}),
}


def factor_of(name: str) -> float:
    _, factor, flags = POLICIES[name]
    return max(factor, flags.get("moe_min_capacity", 0) * E / N)


def compare_all() -> dict[str, tuple[Compared, list[int], int]]:
    start()
    return {name: compare_policy(policy, factor, **flags) for name, (policy, factor, flags) in POLICIES.items()}


@pytest.fixture(scope="module")
def compared() -> dict[str, tuple[Compared, list[int], int]]:
    return run_ranks(1, compare_all)[0]


@pytest.mark.parametrize("name", POLICIES)
def test_equals_a_loop(name: str, compared: dict[str, tuple[Compared, list[int], int]]) -> None:
    """The most probable tokens (or the first) keep their expert; the weight of the others is that of their new one."""
    result, choice, capacity = compared[name]
    assert_equals_the_loop(result)
    *load, dropped, moved = result.load
    assert dropped == max(0, N - capacity * E) == choice.count(-1)
    assert moved > 0 or factor_of(name) < 1
    assert max(load) == capacity, "no expert was full: this test proves nothing"


def routings(policy: str) -> dict[str, Any]:
    """The experts of the same tokens, with one thing changed at a time."""
    start()
    layer = build_layer(**FLAGS, moe_token_drop_policy=policy)
    router = layer.router
    with torch.no_grad():
        # About half of the tokens want the first expert: many have to leave, and may go to many places.
        router.weight[0] *= 4
    seen: list[int] = []
    inner = router.routing

    def noted(logits: Tensor, padding_mask: Any = None) -> tuple[Tensor, Tensor]:
        outputs = inner(logits, padding_mask)
        seen[:] = outputs[1].int().argmax(dim=1).tolist()
        return outputs

    router.routing = noted
    x = hidden_states()

    def route(step: int = 0, layer_number: int = 1, first_sample: int = 5) -> list[int]:
        router.begin_step(step)
        router.layer_number = layer_number
        layer(x, padding_mask=packed_inputs(first_sample))
        return list(seen)

    wanted = (x.reshape(N, -1) @ router.weight.T).argmax(dim=1).tolist()
    results: dict[str, Any] = {"wanted": wanted, "first": route(), "load": router.take_load().int().tolist()}
    with torch.no_grad():
        results["recompute"] = route()
    results["recompute load"] = router.take_load().int().tolist()
    results["next step"] = route(step=1)
    results["next layer"] = route(layer_number=2)
    results["next micro-batch"] = route(first_sample=7)
    results["again"] = route()
    layer.eval()
    results["evaluation"] = route()
    return results


@pytest.mark.parametrize("policy", ["probs", "random"])
def test_chance_is_that_of_step_layer_and_micro_batch(policy: str) -> None:
    got = run_ranks(1, routings, policy)[0]

    def kept(name: str) -> list[bool]:
        return [a == b for a, b in zip(got[name], got["wanted"], strict=True)]

    assert got["again"] == got["recompute"] == got["first"]
    for other in ("next step", "next layer", "next micro-batch"):
        assert got[other] != got["first"], other
        assert (kept(other) != kept("first")) == (policy == "random"), other
    assert got["evaluation"] == got["wanted"] != got["first"]
    assert sum(got["load"][:-2]) == N
    assert got["load"][-1] > 0
    assert got["recompute load"] == [0] * (E + 2)


def aux_losses() -> list[Any]:
    """Value and gradient of the balancing loss with recycling, and under plain top-1."""
    from megatron_moe.moe.metrics import collect_aux_losses

    start()
    results = []
    for flags in (FLAGS, {"router": "topk"}):
        layer = build_layer(**flags | {"moe_aux_loss_coeff": 0.5, "moe_z_loss_coeff": 0.1})
        x = hidden_states()
        out, _ = layer(x, padding_mask=packed_inputs())
        (gradient,) = torch.autograd.grad(out.sum() * 0.0, layer.router.weight)
        results.append([collect_aux_losses(1, 1, 1), gradient.tolist()])
    return results


def test_losses_are_those_of_the_choice_before_recycling() -> None:
    ours, plain = run_ranks(1, aux_losses)[0]
    assert ours == plain
    assert ours[0]["load_balancing_loss"] > 1.0
    assert ours[0]["z_loss"] > 0.0


# ---- runs

POLICY = dict(zip(LAYOUTS, ("probs", "random", "probs"), strict=True))


@pytest.fixture(scope="module")
def alone(tiny_data: Path) -> dict[str, Trained]:
    return {policy: one_process(tiny_data, FLAGS | {"moe_token_drop_policy": policy}) for policy in ("probs", "random")}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, alone: dict[str, Trained], tiny_data: Path) -> None:
    policy = POLICY[layout]
    assert alone[policy].loads == {2: [64] * 4, 4: [32] * 8}
    assert_layout_agrees(layout, alone[policy], tiny_data, FLAGS | {"moe_token_drop_policy": policy})


def test_resumes_bit_for_bit(tiny_data: Path, tmp_path: Path) -> None:
    flags = FLAGS | {"moe_token_drop_policy": "random", "moe_expert_capacity_factor": 0.9, "bf16": True}
    result = resume(tiny_data, tmp_path, flags)
    assert_resumes_bit_for_bit(result)
    assert all(sum(dropped.values()) > 0 for dropped in result.whole.dropped)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"moe_expert_capacity_factor": None}, "--router recycle: needs --moe-expert-capacity-factor"),
        ({"moe_router_topk": 2}, "--moe-router-topk 2: must be 1 with --router recycle"),
        (
            {"moe_pad_expert_input_to_capacity": True},
            "--moe-pad-expert-input-to-capacity True: has no meaning for --router recycle",
        ),
        (
            {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
            "--moe-router-num-groups 2: has no meaning for --router recycle",
        ),
    ],
)
def test_what_cannot_work_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_run(**FLAGS | flags, vocab_size=100, train_iters=1), 1)
