"""The model of the exchange says what the real dispatchers send, and finds the constants of links that obey it."""

import copy
import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import exchange_links, exchange_model
from benchmarks.exchange_model import BETWEEN, INSIDE, LINKS, MACHINES, Collective, Level, Shape
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import tiny_run

HIDDEN = 32
WAYS = ("forward", "backward")


def random_map(ranks: int, shape: Shape, seed: int) -> np.ndarray:
    """k distinct experts for each token of each rank, [P, T, E] of bool."""
    draws = np.random.default_rng(seed).random((ranks, shape.tokens, shape.experts))
    return draws.argsort(axis=2) < shape.topk


def test_probability_is_the_hypergeometric() -> None:
    for experts, held, topk in [(64, 8, 8), (64, 1, 2), (16, 8, 3), (8, 1, 8), (4096, 8, 8)]:
        exact = 1 - math.comb(experts - held, topk) / math.comb(experts, topk)
        assert exchange_model.hit_probability(experts, held, topk) == pytest.approx(exact, rel=1e-12)


def mean_traffic(levels: list[Level]) -> np.ndarray:
    rows = [
        [traffic.kept, *(numbers[link] for numbers in (traffic.messages, traffic.copies) for link in LINKS)]
        for level in levels
        for traffic in (level.there, level.back)
    ]
    return np.array(rows).mean(0)


@pytest.mark.parametrize(("tokens", "topk", "per_node"), [(32, 3, 2), (2, 1, 4), (4, 8, 4)])
def test_expected_traffic_is_the_mean_of_random_routings(tokens: int, topk: int, per_node: int) -> None:
    """Within five standard errors of 200 routings; and 0.005, because an empty message may be too rare to be seen by
    1,600 ranks."""
    ranks, shape = 8, Shape(tokens=tokens, topk=topk, experts=16)
    flat, first, second = [], [], []
    for seed in range(200):
        routing = random_map(ranks, shape, seed)
        levels = [list(ranks) for ranks in zip(*exchange_model.exact_grouped(routing, per_node), strict=True)]
        for means, traffic in zip(
            (flat, first, second), (exchange_model.exact_alltoall(routing, per_node), *levels), strict=True
        ):
            means.append(mean_traffic(traffic))
    expected = (
        exchange_model.expected_alltoall(shape, ranks, per_node),
        *exchange_model.expected_grouped(shape, ranks, per_node),
    )
    for told, seen in zip(expected, (flat, first, second), strict=True):
        values = np.array(seen)
        error = values.std(0) / math.sqrt(len(values))
        assert np.all(np.abs(mean_traffic([told]) - values.mean(0)) <= 5 * error + 0.005)


# ---- against the counters of the real dispatchers


RANKS, EXPERTS, TOKENS, SEED = 8, 16, 24, 7
# Way, ranks of a node, top-k: four nodes, two, one, and eight of one rank.
CASES = (("grouped", 2, 3), ("grouped", 4, 2), ("grouped", 8, 1), ("grouped", 1, 2), ("alltoall", 4, 3))


def shape_of(topk: int) -> Shape:
    return Shape(tokens=TOKENS, hidden=HIDDEN, topk=topk, experts=EXPERTS, element_bytes=4)


def count_exchanges() -> list[dict[str, Any]]:
    """This rank's part of every case."""
    from megatron_moe.moe.layer import moe_layers
    from tests.helpers.models import start_model

    run = tiny_run(
        vocab_size=64,
        num_layers=1,
        hidden_size=HIDDEN,
        num_experts=(EXPERTS,),
        expert_interval=1,
        mlp_type="standard",
        micro_batch_size=1,
        expert_model_parallel_size=RANKS,
    )
    (layer,) = moe_layers(start_model(run)[0])
    return [count_exchange(layer, *case) for case in CASES]


def count_exchange(layer: Any, way: str, per_node: int, topk: int) -> dict[str, Any]:
    """One exchange, forward and backward: messages and bytes by phase, direction and link."""
    import torch
    import torch.distributed as dist
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_moe.moe.dispatch.choose import replace_dispatcher
    from megatron_moe.moe.dispatch.counters import Link, Phase, count_traffic

    config = copy.copy(layer.config)
    config.moe = dataclasses.replace(config.moe, moe_token_dispatcher_type=way)
    config.moe_router_topk, config.ranks_per_node = topk, per_node
    dispatcher: Any = replace_dispatcher(layer.token_dispatcher, config, get_default_pg_collection())
    routing = torch.from_numpy(random_map(RANKS, shape_of(topk), SEED)[dist.get_rank()])
    tokens = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)
    weights = (torch.rand(routing.shape) * routing).requires_grad_()
    with count_traffic() as traffic:
        rows = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(tokens, routing, weights))
        rows, _, sorted_weights = dispatcher.dispatch_postprocess(*rows)
        outputs = dispatcher.combine_preprocess(rows * sorted_weights.unsqueeze(1))
        dispatcher.combine_postprocess(dispatcher.token_combine(outputs)).sum().backward()
    links = {INSIDE: Link.SAME_NODE, BETWEEN: Link.OTHER_NODE}
    return {
        f"{phase} {'backward' if backward else 'forward'} {name}": (volume.messages, volume.bytes)
        for phase, backward, (name, link) in itertools.product(Phase, (False, True), links.items())
        for volume in [traffic.volume(phase=phase, backward=backward, link=link)]
    }


@pytest.fixture(scope="module")
def counted() -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """For each case what every rank counted."""
    return dict(zip(CASES, zip(*run_ranks(RANKS, count_exchanges), strict=True), strict=True))


def told(parts: list[Collective], phase: str) -> dict[str, tuple[float, float]]:
    """Messages and bytes of the collectives of a phase, by link."""
    chosen = [part for part in parts if part.name.startswith(phase)]
    return {
        link: (sum(part.messages.get(link, 0) for part in chosen), sum(part.bytes.get(link, 0) for part in chosen))
        for link in LINKS
    }


def model_of(way: str, per_node: int, topk: int, rank: int | None) -> list[Collective]:
    """The model's collectives: of one rank with the routing of the test, or what is expected of any rank."""
    shape, routing = shape_of(topk), random_map(RANKS, shape_of(topk), SEED)
    if way == "alltoall":
        level = None if rank is None else exchange_model.exact_alltoall(routing, per_node)[rank]
        return exchange_model.alltoall(shape, RANKS, per_node, level)
    levels = None if rank is None else exchange_model.exact_grouped(routing, per_node)[rank]
    return exchange_model.grouped(shape, RANKS, per_node, levels)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_dispatchers_send_what_the_model_says(counted: Any, case: tuple[str, int, int]) -> None:
    """Messages and bytes of every rank, phase and link exactly, when the model is given the routing."""
    for rank, seen in enumerate(counted[case]):
        parts = model_of(*case, rank)
        for phase, link in itertools.product(("counts", "dispatch", "combine"), LINKS):
            if phase == "counts" and case[0] == "alltoall":
                # An all-gather: which ranks send to which is the backend's business.
                continue
            assert seen[f"{phase} forward {link}"] == told(parts, phase)[link], (rank, phase, link)
    # The way back carries the same between the same two ranks, in the other direction.
    for phase, link in itertools.product(("dispatch", "combine"), LINKS):
        there, back = (np.sum([seen[f"{phase} {way} {link}"] for seen in counted[case]], axis=0) for way in WAYS)
        assert there.tolist() == back.tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_dispatchers_send_about_what_is_expected(counted: Any, case: tuple[str, int, int]) -> None:
    """Without the routing: bytes of all ranks within five standard deviations of the expected ones.

    A token's copies over one class of links are at most k at a level, so their standard deviation is at most k / 2;
    tokens are independent. The two levels of `grouped` use one class each.
    """
    shape = shape_of(case[2])
    row = shape.row + EXPERTS * exchange_model.WEIGHT_BYTES
    bound = 5 * shape.topk / 2 * math.sqrt(RANKS * TOKENS) * row
    expected = model_of(*case, None)
    for phase, link in itertools.product(("dispatch", "combine"), LINKS):
        seen = sum(rank[f"{phase} forward {link}"][1] for rank in counted[case])
        assert abs(seen - RANKS * told(expected, phase)[link][1]) <= bound, (phase, link)


# ---- time


def test_hierarchy_wins_by_messages_and_loses_by_bytes() -> None:
    """With messages that cost nothing two exchanges cannot beat one; with bytes that cost nothing the fewer win."""
    shape = Shape(tokens=2048, experts=512)
    free = dataclasses.replace(
        MACHINES["nvlink-400g"], call=0.0, links={link: exchange_model.Link(0.0, 1e-11) for link in LINKS}
    )
    heavy = dataclasses.replace(free, links={link: exchange_model.Link(1e-5, 0.0) for link in LINKS})
    seconds = {
        machine: [
            exchange_model.seconds(
                [part for part in way(shape, 512, 8) if not part.name.startswith("counts")],
                dataclasses.replace(value, memory=0.0),
            )
            for way in (exchange_model.alltoall, exchange_model.grouped)
        ]
        for machine, value in (("free", free), ("heavy", heavy))
    }
    assert seconds["free"][0] < seconds["free"][1]
    # 504 messages (those to empty-handed ranks left out) three times, against 63 + 7 twice.
    filled = 1 - (1 - 1 / 512) ** 2048
    full = 1 - (1 - 1 / 64) ** 2048, 1 - (1 - 1 / 512) ** (2048 * 64)
    assert seconds["heavy"][0] == pytest.approx(3 * 504 * filled * 1e-5)
    assert seconds["heavy"][1] == pytest.approx(2 * (63 * full[0] + 7 * full[1]) * 1e-5)


def test_domain_grouped_is_a_smaller_group() -> None:
    shape = Shape(tokens=100, experts=64, topk=2)
    small = exchange_model.grouped(dataclasses.replace(shape, experts=16), 8, 8)
    assert exchange_model.domain(shape, 32, 8, 4) == small
    assert all(not part.bytes.get(BETWEEN) for part in small)


def test_wins_from_needs_every_larger_scale() -> None:
    scales = (8, 16, 32, 64)
    assert exchange_model.wins_from([2.0, 0.9, 1.1, 1.2], scales) == 32
    assert exchange_model.wins_from([2.0, 2.0, 2.0, 2.0], scales) == 8
    assert exchange_model.wins_from([2.0, 2.0, 2.0, 0.9], scales) is None


@pytest.mark.parametrize("in_turn", [False, True])
def test_fit_finds_the_constants(in_turn: bool) -> None:
    truth = exchange_links.Fit(7e-6, (1e-6, 2e-5), (1e-10, 3e-9), in_turn)
    cases = [((1, 0), 4), ((3, 0), 4), ((0, 1), 4), ((0, 3), 4), ((3, 12), 4)]
    timings = [exchange_links.Timing(messages, 2**power, 0.0) for messages, _ in cases for power in range(8, 23, 2)]
    timings = [dataclasses.replace(timing, seconds=truth.seconds(timing)) for timing in timings]
    found = exchange_links.fit(timings)
    assert found.in_turn == in_turn
    assert found.call == pytest.approx(truth.call)
    assert found.alpha == pytest.approx(truth.alpha)
    assert found.beta == pytest.approx(truth.beta)


# ---- command line


def test_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exchange_model.main(["--machine", "nvlink-400g", "--plot", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert len([row for row in rows if row[0] in ("256", "2,048", "16,384")]) == 9
    assert any(line.startswith("assumed:") for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"exchange_ratio.png", "exchange_seconds.png"}


def test_wrong_machine_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "links.json").write_text(json.dumps({"ranks_per_node": 8}))
    for name in ("nvlink", str(tmp_path / "links.json")):
        with pytest.raises(SystemExit):
            exchange_model.main(["--machine", name])
        assert "neither one of nvlink-400g" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_measured_links_are_read_back(capfd: pytest.CaptureFixture[str]) -> None:
    """Two ranks on two nodes of one: real timings, fitted, and tables made of them."""
    exchange_model.main(["--measure", "--ranks", "2", "--ranks-per-node", "1", "--device", "cpu"])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("measured: 2 ranks of gloo, 1 a node")
    assert any(line.startswith("between: ") for line in lines)
    assert any(line.startswith("measured: 1 ranks a node; ") for line in lines)
