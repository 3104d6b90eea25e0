"""Messages and bytes of both dispatchers, against numbers worked out from the routing maps in plain Python.

Every rank of 8 counts what it sends in a forward and a backward pass; blocks of 4 or 8 ranks, nodes of 1 to 8.
"""

from collections import defaultdict
from typing import Any

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.moe.dispatch.counters import Link, Phase, Traffic, Volume, count_traffic, record
from megatron_moe.moe.dispatch.nodes import NodeGrid, node_grid
from tests.helpers.distributed import run_ranks
from tests.moe.dispatch.cases import Case, H, make_dispatcher, make_groups, make_map, through
from tests.moe.dispatch.test_dispatchers import start

CASES = [
    Case(ep=4, node=2, experts=8, topk=2),
    Case(ep=4, node=4, experts=8, topk=2),
    Case(ep=8, node=2, experts=16, topk=2),
    Case(ep=8, node=4, experts=16, topk=2),
    Case(ep=8, node=4, experts=16, topk=4),
    Case(ep=8, node=4, experts=8, topk=1),
    Case(ep=8, node=8, experts=16, topk=2),
    Case(ep=8, node=1, experts=16, topk=2),
    Case(ep=8, node=4, experts=16, topk=2, routing="empty"),
    Case(ep=8, node=2, experts=16, topk=2, routing="drops"),
]
ROW, NUMBER, COUNT = 4 * H, 4, 8
Volumes = dict[tuple[Phase, bool, Link], Volume]


def measure() -> list[dict[str, Volumes]]:
    start()
    groups = make_groups(CASES)
    found = []
    for case in CASES:
        by_kind = {}
        for kind in ("alltoall", "grouped"):
            dispatcher = make_dispatcher(case, groups, kind)
            with count_traffic() as traffic:
                through(case, dispatcher)
            through(case, dispatcher)
            by_kind[kind] = traffic.volumes
        found.append(by_kind)
    return found


@pytest.fixture(scope="module")
def measured() -> list[list[dict[str, Volumes]]]:
    """By case, then by rank."""
    return [list(case) for case in zip(*run_ranks(8, measure), strict=True)]


# ---- by hand


def link(case: Case, a: int, b: int) -> Link:
    if a == b:
        return Link.SAME_RANK
    return Link.SAME_NODE if a // case.node == b // case.node else Link.OTHER_NODE


class ByHand:
    """What one rank sends."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case, self.rank = case, rank
        self.first = rank - rank % case.ep
        self.volumes: dict[tuple[Phase, bool, Link], Volume] = defaultdict(Volume)

    def send(self, phase: Phase, backward: bool, to: int, rows: int, payload: int, metadata: int) -> None:
        if rows:
            self.volumes[phase, backward, link(self.case, self.rank, to)] += Volume(1, rows * payload, rows * metadata)

    def ranks_of(self, source: int) -> list[set[int]]:
        """For each token of a rank, the ranks that have one of its experts."""
        local = self.case.experts // self.case.ep
        chosen = make_map(self.case, source).tolist()
        return [{self.first + e // local for e, yes in enumerate(token) if yes} for token in chosen]

    def both_ways(self, to: int, sent: int, received: int, metadata: int) -> None:
        """A message to a peer in each of four passes: what it got from here travels back in two of them."""
        self.send(Phase.DISPATCH, False, to, sent, ROW, metadata)
        self.send(Phase.DISPATCH, True, to, received, ROW, metadata)
        self.send(Phase.COMBINE, False, to, received, ROW, 0)
        self.send(Phase.COMBINE, True, to, sent, ROW, 0)

    def alltoall(self) -> Volumes:
        case, local = self.case, self.case.experts // self.case.ep

        def routed(source: int, target: int) -> int:
            begin = (target - self.first) * local
            return int(make_map(case, source)[:, begin : begin + local].sum())

        for other in range(self.first, self.first + case.ep):
            sent, received = routed(self.rank, other), routed(other, self.rank)
            self.both_ways(other, sent, received, 0)
            # Weights travel by themselves.
            self.send(Phase.DISPATCH, False, other, sent, 0, NUMBER)
            self.send(Phase.DISPATCH, True, other, received, 0, NUMBER)
            self.send(Phase.COUNTS, False, other, 1, 0, case.experts * COUNT)
        return dict(self.volumes)

    def grouped(self) -> Volumes:
        case = self.case
        block = range(self.first, self.first + case.ep)
        if case.node in (1, 8) or case.node >= case.ep:
            for other in block:
                sent = sum(other in ranks for ranks in self.ranks_of(self.rank))
                received = sum(self.rank in ranks for ranks in self.ranks_of(other))
                self.both_ways(other, sent, received, case.experts // case.ep * NUMBER)
                self.send(Phase.COUNTS, False, other, 1, 0, 2 * COUNT)
            return dict(self.volumes)

        def at_node(source: int, node: int) -> int:
            return sum(any(rank // case.node == node for rank in ranks) for ranks in self.ranks_of(source))

        nodes = case.ep // case.node
        place, node = self.rank % case.node, self.rank // case.node
        for other in block:
            if other % case.node == place:
                sent, received = at_node(self.rank, other // case.node), at_node(other, node)
                self.both_ways(other, sent, received, case.experts // nodes * NUMBER)
                self.send(Phase.COUNTS, False, other, 1, 0, (1 + 2 * case.node) * COUNT)
            if other // case.node == node:
                # What the ranks of this place have for that rank, and those of that place for this one.
                sent = sum(
                    other in ranks for source in block if source % case.node == place for ranks in self.ranks_of(source)
                )
                received = sum(
                    self.rank in ranks
                    for source in block
                    if source % case.node == other % case.node
                    for ranks in self.ranks_of(source)
                )
                self.both_ways(other, sent, received, case.experts // case.ep * NUMBER)
                self.send(Phase.COUNTS, False, other, 1, 0, 2 * COUNT)
        return dict(self.volumes)


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("kind", ["alltoall", "grouped"])
def test_counts_what_the_map_says(kind: str, number: int, measured: list[list[dict[str, Volumes]]]) -> None:
    for rank, by_kind in enumerate(measured[number]):
        expected = getattr(ByHand(CASES[number], rank), kind)()
        assert by_kind[kind] == expected
        assert len(expected) > 4


def total(ranks: list[dict[str, Volumes]], kind: str, **wanted: Any) -> Volume:
    return sum((Traffic(by_kind[kind]).volume(**wanted) for by_kind in ranks), Volume())


@pytest.mark.parametrize("number", [0, 2, 3, 4, 5])
def test_messages_between_nodes_fall_to_one_a_node(number: int, measured: list[list[dict[str, Volumes]]]) -> None:
    case, ranks = CASES[number], measured[number]
    for by_kind in ranks:
        for phase in (Phase.DISPATCH, Phase.COMBINE):
            for backward in (False, True):
                wanted: dict[str, Any] = {"phase": phase, "backward": backward, "link": Link.OTHER_NODE}
                assert Traffic(by_kind["grouped"]).volume(**wanted).messages == case.ep // case.node - 1
                messages = Traffic(by_kind["alltoall"]).volume(**wanted).messages
                # Tokens are few: not every rank has one for every other.
                assert case.ep // case.node - 1 < messages <= 2 * (case.ep - case.node)


@pytest.mark.parametrize("number", [0, 2, 3, 4, 7, 8])
def test_rows_between_nodes_are_fewer(number: int, measured: list[list[dict[str, Volumes]]]) -> None:
    """Fewer by the copies that share a node; nothing is lost, so a token that needs a node goes there."""
    case, ranks = CASES[number], measured[number]
    grouped, alltoall = (
        total(ranks, kind, phase=Phase.DISPATCH, backward=False, link=Link.OTHER_NODE).payload
        for kind in ("grouped", "alltoall")
    )
    local = case.experts // case.ep
    shared = 0
    for rank in range(8):
        for token in make_map(case, rank).tolist():
            targets = [e // local // case.node for e, yes in enumerate(token) if yes]
            away = [node for node in targets if node != rank % case.ep // case.node]
            shared += len(away) - len(set(away))
    assert alltoall - grouped == shared * ROW
    assert shared > 0


def test_one_expert_a_token_moves_the_same_rows_between_nodes(measured: list[list[dict[str, Volumes]]]) -> None:
    ranks = measured[5]
    wanted: dict[str, Any] = {"link": Link.OTHER_NODE, "phase": Phase.DISPATCH}
    assert total(ranks, "grouped", **wanted).payload == total(ranks, "alltoall", **wanted).payload > 0


def test_counters_nest_and_stop() -> None:
    with count_traffic() as outer:
        record(Phase.DISPATCH, False, [Link.SAME_NODE], [3], 10, 2)
        with count_traffic() as inner:
            record(Phase.DISPATCH, False, [Link.SAME_NODE, Link.OTHER_NODE], [0, 1], 10, 2)
    record(Phase.DISPATCH, False, [Link.SAME_NODE], [3], 10, 2)
    assert inner.volumes == {(Phase.DISPATCH, False, Link.OTHER_NODE): Volume(1, 10, 2)}
    assert outer.volume() == Volume(2, 40, 8)
    assert outer.volume(link=Link.SAME_NODE).bytes == 36
    assert outer.volume(backward=True) == Volume()


# ---- layout


def test_a_group_is_nodes_times_places() -> None:
    assert node_grid(range(8), 4) == NodeGrid(2, 4)
    assert node_grid(range(2, 6), 4) == NodeGrid(2, 2)
    assert node_grid(range(8, 16), 4) == NodeGrid(2, 4)
    # Every second rank: expert tensor parallelism.
    assert node_grid(range(0, 16, 2), 4) == NodeGrid(4, 2)
    assert [node_grid(range(8), size).levels for size in (1, 2, 8, 16)] == [(8,), (4, 2), (8,), (8,)]
    assert node_grid([5], 4).levels == (1,)


def test_nodes_of_unequal_size_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--ranks-per-node 3: puts 3, 3, 2 of 8 ranks .* 1, 2, 4, 8$"):
        node_grid(range(8), 3)
