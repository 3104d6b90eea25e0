"""The order of rows and its two maps: against plain Python, their gradients, what they keep, and upstream's."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.moe.dispatch.permutation import Fan, chunk_order, copy_rows, permutation, sum_rows
from tests.helpers.distributed import run_ranks


def random_map(tokens: int, experts: int, k: int | None, seed: int = 0) -> Tensor:
    """k experts for each token, or any number of them for None."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    if k is None:
        return scores > 0.6
    return torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, scores.topk(k, dim=1).indices, True)


MAPS = {
    "top-1": (random_map(9, 5, 1), 1),
    "top-2": (random_map(9, 5, 2), 2),
    "top-3": (random_map(9, 5, 3), 3),
    "all": (torch.ones(4, 3, dtype=torch.bool), 3),
    "any": (random_map(9, 5, None), None),
    "top-2, as if any": (random_map(9, 5, 2), None),
    "one expert": (random_map(9, 5, 1) & torch.tensor([0, 0, 1, 0, 0]).bool(), None),
    "no assignment": (torch.zeros(4, 3, dtype=torch.bool), None),
    "no token": (torch.zeros(0, 3, dtype=torch.bool), None),
    "one column": (random_map(6, 1, None), None),
}


@pytest.mark.parametrize("name", MAPS)
def test_rows_are_sorted_by_expert_and_summed_by_token(name: str) -> None:
    map_NE, k = MAPS[name]
    pairs = [(e, n) for e in range(map_NE.shape[1]) for n in range(map_NE.shape[0]) if map_NE[n, e]]
    order = permutation(map_NE, len(pairs), k)
    x, values = torch.randn(len(map_NE), 6), torch.randn(map_NE.shape)
    rows = copy_rows(x, order.fan)
    assert torch.equal(rows, torch.stack([x[n] for _, n in pairs]) if pairs else x.new_zeros(0, 6))
    assert order.pick(values).tolist() == [float(values[n, e]) for e, n in pairs]
    y = torch.randn(len(pairs), 6)
    expected = torch.zeros_like(x)
    for i, (_, n) in enumerate(pairs):
        expected[n] += y[i]
    assert torch.equal(sum_rows(y, order.fan), expected)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32_and_rounded_once(name: str, half: torch.dtype) -> None:
    map_NE, k = MAPS[name]
    order = permutation(map_NE, int(map_NE.sum()), k)
    y = torch.randn(int(map_NE.sum()), 8, generator=torch.Generator().manual_seed(1)).to(half)
    assert torch.equal(sum_rows(y, order.fan), sum_rows(y.float(), order.fan).to(half))


@pytest.mark.parametrize("name", [name for name in MAPS if name not in ("no token", "no assignment")])
def test_gradients(name: str) -> None:
    map_NE, k = MAPS[name]
    order = permutation(map_NE, int(map_NE.sum()), k)
    x = torch.randn(len(map_NE), 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(int(map_NE.sum()), 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: copy_rows(x, order.fan), (x,))
    assert torch.autograd.gradcheck(lambda y: sum_rows(y, order.fan), (y,))
    assert torch.autograd.gradgradcheck(lambda y: sum_rows(y, order.fan).square(), (y,))
    assert torch.autograd.gradcheck(order.pick, (torch.rand(map_NE.shape, dtype=torch.float64, requires_grad=True),))


def test_rows_of_a_wider_buffer() -> None:
    """What comes out of a message: rows beside their weights."""
    map_NE = random_map(9, 5, 2)
    order = permutation(map_NE, 18, 2)
    wide = torch.randn(18, 10)
    assert torch.equal(sum_rows(wide[:, 3:], order.fan), sum_rows(wide[:, 3:].clone(), order.fan))
    assert torch.equal(copy_rows(wide[:9, 3:], order.fan), copy_rows(wide[:9, 3:].clone(), order.fan))


def test_a_wrong_number_of_assignments_is_an_error() -> None:
    map_NE = random_map(9, 5, 2)
    map_NE[3] &= map_NE[3].cumsum(0) < 2
    with pytest.raises(ValueError, match="the routing map has 17 assignments of 9 tokens, not 18"):
        permutation(map_NE, 18, 2)


# ---- chunks


def test_chunks_change_from_source_order_to_column_order() -> None:
    counts = torch.tensor([[2, 0, 1], [0, 3, 2], [1, 1, 0], [0, 0, 0]])
    rows = [(s, c, i) for s in range(4) for c in range(3) for i in range(counts[s, c])]
    wanted = sorted(rows, key=lambda row: (row[1], row[0], row[2]))
    order = chunk_order(counts, len(rows))
    numbered = torch.arange(len(rows), dtype=torch.float32)[:, None]
    moved = copy_rows(numbered, order)
    assert [rows[int(i)] for i in moved] == wanted
    assert torch.equal(sum_rows(moved, order), numbered)
    empty = chunk_order(torch.zeros(2, 3, dtype=torch.long), 0)
    assert copy_rows(numbered[:0], empty).shape == sum_rows(numbered[:0], empty).shape == (0, 1)


# ---- what is kept


def bytes_of(fan: Fan) -> int:
    tensors = [value for value in vars(fan).values() if isinstance(value, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize("k", [1, 2, None])
def test_memory_is_what_the_docstring_says(k: int | None) -> None:
    """12 R + 4 N bytes (without the last where all tokens have k rows), and no hidden row."""
    tokens = 64
    map_NE = random_map(tokens, 8, k)
    rows = int(map_NE.sum())
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(tokens, 32, requires_grad=True)
    weights = torch.rand(map_NE.shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        order = permutation(map_NE, rows, k)
        copied, picked = copy_rows(x, order.fan), order.pick(weights)
        out = sum_rows(copied, order.fan)
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} == {order.address_R.untyped_storage().data_ptr()}
    kept = bytes_of(order.fan) + order.address_R.untyped_storage().nbytes()
    assert kept == 12 * rows + (0 if k else 4 * tokens)
    torch.autograd.grad([out.sum(), picked.sum()], [x, weights])


# ---- upstream's


def upstream(x: Tensor, map_NE: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    from megatron.core.transformer.moe.moe_utils import permute, sort_chunks_by_idxs, unpermute

    experts = map_NE.shape[1]
    rows, picked, order, _, _ = permute(x, map_NE, probs=weights, num_out_tokens=int(map_NE.sum()))
    counts, same = map_NE.sum(dim=0), torch.arange(experts)
    rows, picked = sort_chunks_by_idxs(rows, counts, same, probs=picked)
    rows, _ = sort_chunks_by_idxs(rows * picked[:, None].to(x.dtype), counts, same)
    return unpermute(rows, order, x.shape), picked


def compare(dtype: torch.dtype, k: int | None) -> list[bool]:
    map_NE = random_map(300, 16, k)
    order = permutation(map_NE, int(map_NE.sum()), k)
    generator = torch.Generator().manual_seed(3)
    x, probe = (torch.randn(300, 24, generator=generator).to(dtype) for _ in range(2))
    weights = torch.rand(map_NE.shape, generator=generator) * map_NE
    results: list[list[Any]] = []
    for ours in (True, False):
        x_leaf, weights_leaf = x.clone().requires_grad_(), weights.clone().requires_grad_()
        if ours:
            picked = order.pick(weights_leaf)
            out = sum_rows(copy_rows(x_leaf, order.fan) * picked[:, None].to(dtype), order.fan)
        else:
            out, picked = upstream(x_leaf, map_NE, weights_leaf)
        results.append([out, picked, *torch.autograd.grad((out * probe).sum(), [x_leaf, weights_leaf])])
    return [torch.equal(a, b) for a, b in zip(*results, strict=True)]


def compare_all() -> list[list[bool]]:
    return [compare(dtype, k) for dtype in (torch.float32, torch.bfloat16) for k in (1, 2, 4, None)]


def test_equals_upstream_bit_for_bit() -> None:
    """Output, weights and both gradients."""
    assert run_ranks(1, compare_all)[0] == [[True] * 4] * 8
