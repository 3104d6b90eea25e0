"""Balanced assignment: equal shares, a bounded distance to the best sum, and an end, whatever the scores."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor

from megatron_moe.moe.assignment import PRECISION, balanced_assignment

SIZES = [(1, 1), (1, 4), (3, 8), (7, 3), (8, 8), (16, 4), (23, 5), (32, 8), (29, 8), (20, 2)]
GRID = 1e-6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Hundreds of rounds of small operations: threads that wait for each other cost more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scores(kind: str, tokens: int, experts: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * 100 + experts)
    normal_ME = torch.randn(tokens, experts, generator=generator)
    match kind:
        case "plain":
            return normal_ME
        case "all want the same":
            return 0.1 * normal_ME + torch.arange(experts)
        case "ties":
            return normal_ME.round()
        case "same tokens":
            return normal_ME[torch.arange(tokens) % 3 if tokens > 3 else torch.zeros(tokens, dtype=torch.long)]
        case other:
            raise ValueError(other)


KINDS = ["plain", "all want the same", "ties", "same tokens"]


def largest_sum(scores_ME: Tensor) -> float:
    """Of all assignments with floor(M / E) or ceil(M / E) tokens at every expert: a minimum cost flow, scores rounded
    to GRID."""
    tokens, experts = scores_ME.shape
    share = tokens // experts
    graph: Any = nx.DiGraph()
    graph.add_node("rest", demand=tokens - share * experts)
    for expert in range(experts):
        graph.add_node(("expert", expert), demand=share)
        graph.add_edge(("expert", expert), "rest", capacity=1, weight=0)
    for token, expert in product(range(tokens), range(experts)):
        graph.add_node(("token", token), demand=-1)
        cost = -round(float(scores_ME[token, expert]) / GRID)
        graph.add_edge(("token", token), ("expert", expert), capacity=1, weight=cost)
    return -nx.network_simplex(graph)[0] * GRID


def sum_of(scores_ME: Tensor, expert_M: Tensor) -> float:
    return float(scores_ME.double().gather(1, expert_M[:, None]).sum())


def assert_balanced(expert_M: Tensor, tokens: int, experts: int) -> None:
    load = torch.bincount(expert_M, minlength=experts).tolist()
    assert len(load) == experts
    assert set(load) <= {tokens // experts, -(-tokens // experts)}
    assert sum(load) == tokens


@pytest.mark.parametrize("kind", KINDS)
def test_is_balanced_and_as_good_as_it_says(kind: str) -> None:
    for tokens, experts in SIZES:
        scores_ME = scores(kind, tokens, experts)
        best = largest_sum(scores_ME)
        places = -(-tokens // experts) * experts
        spread = float(scores_ME.max() - scores_ME.min())
        for precision in (0.1, PRECISION, 1e-5):
            expert_M = balanced_assignment(scores_ME, precision)
            assert_balanced(expert_M, tokens, experts)
            gap = best - sum_of(scores_ME, expert_M)
            assert -tokens * GRID <= gap <= places * precision * spread + tokens * GRID, (tokens, experts, precision)


def test_a_greedy_choice_is_neither() -> None:
    """What the test above would say of it."""
    scores_ME = scores("all want the same", 64, 8)
    with pytest.raises(AssertionError):
        assert_balanced(scores_ME.argmax(dim=1), 64, 8)
    in_turn = torch.arange(64) % 8
    assert largest_sum(scores_ME) - sum_of(scores_ME, in_turn) > 64 * PRECISION * float(scores_ME.max())


def test_shares_are_chosen_by_scores_where_experts_do_not_divide_the_tokens() -> None:
    """Two tokens, four experts: those that the tokens want, not the first ones."""
    scores_ME = torch.tensor([[0.0, 0.0, 0.0, 2.0], [0.0, 0.0, 1.0, 2.0]])
    assert balanced_assignment(scores_ME).tolist() == [3, 2]
    # Seven for three: the third expert, which all want, gets three.
    scores_ME = torch.zeros(7, 3)
    scores_ME[:, 2] = torch.arange(7)
    expert_M = balanced_assignment(scores_ME)
    assert (expert_M == 2).nonzero()[:, 0].tolist() == [4, 5, 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e38])
def test_ends_with_numbers_that_are_not_finite(value: float) -> None:
    """The step is skipped for them, but it must come to its end on every rank."""
    scores_ME = scores("plain", 20, 4)
    scores_ME[3, 1] = scores_ME[11, 2] = value
    assert_balanced(balanced_assignment(scores_ME), 20, 4)
    assert_balanced(balanced_assignment(torch.full((20, 4), value)), 20, 4)


def test_no_tokens() -> None:
    assert balanced_assignment(torch.zeros(0, 4)).tolist() == []


def test_does_not_depend_on_units() -> None:
    """A bf16 model's scores, or large ones: the bids are relative to the range of scores."""
    scores_ME = scores("plain", 61, 8)
    expert_M = balanced_assignment(scores_ME)
    assert torch.equal(balanced_assignment(scores_ME * 1024), expert_M)
    assert torch.equal(balanced_assignment(scores_ME.double() / 1024 + 0.5), expert_M)
    assert_balanced(balanced_assignment(scores_ME.bfloat16()), 61, 8)


@pytest.mark.slow
def test_many_tokens() -> None:
    """As many as a real micro-batch has: balanced, and no worse than an upper bound, the dual's, says it may be."""
    scores_ME = scores("all want the same", 4096, 64)
    expert_M = balanced_assignment(scores_ME)
    assert_balanced(expert_M, 4096, 64)
    # For any prices, the sum of everyone's best score less its price, plus all places at their prices, is at least
    # the best sum. Means of the columns are good prices here, where all tokens want the same.
    price_E = scores_ME.mean(dim=0).double()
    bound = float((scores_ME.double() - price_E).amax(dim=1).sum() + 64 * price_E.sum())
    spread = float(scores_ME.max() - scores_ME.min())
    assert sum_of(scores_ME, expert_M) <= bound
    assert sum_of(scores_ME, expert_M) >= bound - 4096 * PRECISION * spread
