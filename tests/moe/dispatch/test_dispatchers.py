"""Both dispatchers against a dense layer and against upstream's, on 8 ranks: every expert-parallel and node size.

Tolerances: fp32, 2e-6 of the largest value of a tensor, for a sum of up to 8 terms in another order; bf16, see
`test_half_precision`.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.distributed import run_ranks
from tests.moe.dispatch.cases import Case, make_dispatcher, make_groups, naive, slice_of, sum_of_terms, through

NAMES = ("output", "input", "weights", "w1", "w2")
GRID = [
    Case(ep=ep, node=node, experts=max(ep, 2) * local, topk=topk)
    for ep, node, local, topk in (
        (1, 2, 2, 2),
        (2, 1, 1, 1),
        (2, 2, 3, 2),
        (4, 1, 1, 1),
        (4, 2, 2, 2),
        (4, 2, 2, 3),
        (4, 4, 1, 2),
        (8, 1, 1, 2),
        (8, 2, 1, 1),
        (8, 2, 1, 2),
        (8, 2, 2, 3),
        (8, 4, 1, 2),
        (8, 4, 2, 1),
        (8, 4, 3, 2),
        (8, 8, 2, 2),
    )
]
LOADS = [
    Case(ep=ep, node=node, experts=16, topk=2, routing=routing)
    for routing in ("skewed", "empty", "spread", "drops", "choice")
    for ep, node in ((4, 2), (8, 4))
] + [Case(ep=1, experts=4, routing="drops"), Case(ep=8, node=2, experts=16, routing="drops")]
TENSOR = [
    Case(ep=2, etp=2, node=4, experts=4),
    Case(ep=4, etp=2, node=4, experts=8),
    Case(ep=4, etp=2, node=2, experts=8, routing="drops"),
    Case(ep=4, etp=2, node=1, experts=8, topk=3),
    Case(ep=1, etp=2, node=8, experts=4, routing="empty"),
]
FP64 = [Case(ep=8, node=4, experts=16, weights=torch.float64)]
CASES = GRID + LOADS + TENSOR + FP64
HALF = [
    Case(ep=ep, node=node, experts=16, topk=topk, routing=routing, dtype=torch.bfloat16)
    for ep, node, topk, routing in ((1, 8, 3, "random"), (4, 2, 2, "random"), (8, 4, 4, "random"), (8, 2, 2, "drops"))
]


PADDED = [
    Case(ep=4, experts=8, routing="padded"),
    Case(ep=2, etp=2, experts=4, routing="padded"),
    Case(ep=1, experts=4, topk=1, routing="padded"),
]
UNIT = 2.0**-8
"""Half the distance of 1 and the next number of bf16."""


def start() -> None:
    from megatron_moe.runtime import distributed
    from megatron_moe.runtime.seeds import set_seeds
    from tests.helpers.tiny import tiny_run

    distributed.start(tiny_run().parallel)
    set_seeds(1)


def compare() -> list[dict[str, Any]]:
    """For every case, on this rank: errors against the dense form, and what differs from upstream."""
    start()
    groups = make_groups(CASES + HALF + PADDED)
    found = []
    for case in CASES + HALF:
        stock = through(case, make_dispatcher(case, groups, "stock"))
        alltoall = through(case, make_dispatcher(case, groups, "alltoall"))
        dispatcher = make_dispatcher(case, groups, "grouped")
        grouped = through(case, dispatcher)
        assert len(getattr(dispatcher, "_wires", [])) == levels(case)
        expected = slice_of(case, dispatcher, naive(case, dist.get_rank()))
        again = through(case, dispatcher)
        found.append(
            {
                "unlike stock": [n for n, a, b in zip(NAMES, alltoall, stock, strict=True) if not torch.equal(a, b)],
                "extra": extra(case, grouped[0], alltoall[0]),
                "unlike itself": [n for n, a, b in zip(NAMES, grouped, again, strict=True) if not torch.equal(a, b)],
                "errors": errors(grouped, expected),
                "stock errors": errors(stock, expected),
                "largest": [float(tensor.abs().max()) for tensor in expected],
            }
        )
    # Upstream's own code in ours, around our exchange; `grouped` refuses to pad.
    for case in PADDED:
        stock, alltoall = (through(case, make_dispatcher(case, groups, kind)) for kind in ("stock", "alltoall"))
        assert stock[0].abs().max() > 0 < stock[1].abs().max()
        unlike = [n for n, a, b in zip(NAMES, alltoall, stock, strict=True) if not torch.equal(a, b)]
        found.append({"unlike stock": unlike, "unlike itself": []})
    return found


def extra(case: Case, ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, in units of the absolute sum of an element's terms."""
    terms = sum_of_terms(case, dist.get_rank())
    return float(((ours - theirs).abs() / terms.clamp(min=1e-3)).max())


def levels(case: Case) -> int:
    """Exchanges of a dispatch, by hand."""
    if case.ep == 1:
        return 0
    places = max(1, min(case.ep, case.node // case.etp))
    return 2 if 1 < places < case.ep else 1


def errors(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [float((a.double() - b).abs().max()) for a, b in zip(ours, expected, strict=True)]


@pytest.fixture(scope="module")
def compared() -> list[list[dict[str, Any]]]:
    """By case, then by rank."""
    by_rank = run_ranks(8, compare)
    return [list(case) for case in zip(*by_rank, strict=True)]


def scales(ranks: list[dict[str, Any]]) -> list[float]:
    """The largest value of each tensor on any rank; nothing that is compared may be all zeros."""
    largest = [max(rank["largest"][i] for rank in ranks) for i in range(len(NAMES))]
    assert min(largest) > 1e-2
    return largest


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: str(CASES[i]) if isinstance(i, int) else None)
def test_grouped_equals_a_dense_layer(number: int, compared: list[list[dict[str, Any]]]) -> None:
    ranks = compared[number]
    allowed = [2e-6 * scale for scale in scales(ranks)]
    for rank in ranks:
        assert [e <= most for e, most in zip(rank["errors"], allowed, strict=True)] == [True] * 5, rank["errors"]


@pytest.mark.parametrize("number", range(len(CASES + HALF + PADDED)))
def test_alltoall_equals_upstream_bit_for_bit(number: int, compared: list[list[dict[str, Any]]]) -> None:
    for rank in compared[number]:
        assert rank["unlike stock"] == []
        assert rank["unlike itself"] == []


@pytest.mark.parametrize("number", range(len(CASES), len(CASES) + len(HALF)))
def test_half_precision(number: int, compared: list[list[dict[str, Any]]]) -> None:
    """Two more roundings, of partial sums, and that of the result on either side: 4 u of the terms' absolute sum."""
    ranks = compared[number]
    assert max(rank["extra"] for rank in ranks) <= 4 * UNIT * 1.01
    for i, scale in enumerate(scales(ranks)):
        ours, stock = (max(rank[key][i] for rank in ranks) for key in ("errors", "stock errors"))
        assert 0 < ours <= stock + 2 * UNIT * scale
