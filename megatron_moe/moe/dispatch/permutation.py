"""Rows of tokens put in the order of their experts, and summed back: gathers both ways, no scatter, no Python loop.

The way there copies row `source[i]` of the tokens to place i. The way back sums, for each token, the rows at its
places, in the order of its experts: one pass (`torch.embedding_bag`) without a gathered copy between. Each is the
gradient of the other. Sums are taken in fp32 and rounded once, always in the same order: deterministic on every device.
In bf16 and fp16 a CPU adds the rows one after the other (`index_add_`, which is as exact, and as fast as upstream's).

Memory kept between the way there and the way back, of N tokens and R routed rows: 4 bytes a row for its token, 4 for
its place and 4 for its weight's address, and 4 a token where tokens have unequal numbers of rows:
`12 R + 4 N` bytes, and no hidden row. The least possible is R log2(N) + R log2(R) bits for the two orders, 3 bytes a
row at N = 2,048: nothing beside a row of H = 512 fp32 numbers, which is 2,048 bytes. The experts keep the R rows that
they multiply (their weights' gradient needs them); the tokens themselves and the summed rows are kept by nobody here.

Shape legend: N = tokens, E = destinations (experts, ranks or nodes), R = routed rows, H = hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fan:
    """Which of N rows is copied to each of R places. All index tensors are int32."""

    rows: int
    """N."""
    source_R: Tensor
    """The row whose copy stands at a place."""
    places_R: Tensor
    """Places by row: those of row 0 in ascending order, then those of row 1."""
    starts_N: Tensor | None
    """Where a row's places begin in `places_R`. None: every row has R / N of them."""

    def copy(self, x_NH: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows at their places, [R, H]; without a gradient."""
        return torch.index_select(x_NH, 0, self.source_R, out=out)

    def sum(self, y_RH: Tensor) -> Tensor:
        """For each of N rows the sum over its places, [N, H]; zeros where it has none; without a gradient."""
        places = self.places_R.numel()
        if places == 0:
            return y_RH.new_zeros((self.rows, y_RH.shape[1]))
        if self.starts_N is None and places == self.rows:
            return y_RH.index_select(0, self.places_R)
        if y_RH.device.type == "cpu" and y_RH.dtype.itemsize == 2:
            # The other way rounds halves up here (FBGEMM); this adds in fp32, in order, and rounds to even. With int32
            # it would not: it rounds after each row, and takes three times as long.
            return y_RH.new_zeros((self.rows, y_RH.shape[1])).index_add_(0, self.source_R.long(), y_RH)
        starts_N = self.starts_N
        if starts_N is None:
            starts_N = torch.arange(0, places, places // self.rows, dtype=torch.int32, device=y_RH.device)
        # Twice as fast on dense rows, whatever the copy costs.
        return torch.embedding_bag(y_RH.contiguous(), self.places_R, starts_N, False, 0)[0]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, fan: Fan) -> Tensor:
        ctx.fan = fan
        return fan.copy(x_NH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return sum_rows(gradients[0], ctx.fan), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RH: Tensor, fan: Fan) -> Tensor:
        ctx.fan = fan
        return fan.sum(y_RH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return copy_rows(gradients[0], ctx.fan), None


def copy_rows(x_NH: Tensor, fan: Fan) -> Tensor:
    """Each row at its places: [R, H]."""
    copied: Tensor = _Copy.apply(x_NH, fan)
    return copied


def sum_rows(y_RH: Tensor, fan: Fan) -> Tensor:
    """For each row the sum over its places: [N, H]."""
    summed: Tensor = _Sum.apply(y_RH, fan)
    return summed


@dataclass(frozen=True)
class Permutation:
    """Rows of a map [N, E] sorted by its columns, and by token inside of a column.

    Attributes:
        fan: from tokens to sorted rows.
        address_R: int32 position of each sorted row's assignment in the flattened map.
    """

    fan: Fan
    address_R: Tensor

    def pick(self, values_NE: Tensor) -> Tensor:
        """The values of the assignments, [R]; with a gradient."""
        return values_NE.reshape(-1).index_select(0, self.address_R)


def permutation(map_NE: Tensor, rows: int, per_token: int | None = None) -> Permutation:
    """Order of the assignments in a map. Does not wait for the device.

    Args:
        map_NE: [N, E] bool.
        rows: R, the number of assignments in it, which the caller knows.
        per_token: assignments of every token, where all have the same number.

    Raises:
        ValueError: the map has another number of assignments (on a CPU; a GPU fails at its next use).
    """
    tokens, columns = map_NE.shape
    map_EN = map_NE.t().contiguous()
    if map_NE.is_cuda:
        # Fails on the device, without the host waiting for it.
        torch._assert_async(map_NE.sum() == rows, "the routing map has another number of assignments than announced")
        column_R, token_R = torch.nonzero_static(map_EN, size=rows).unbind(1)
    else:
        column_R, token_R = map_EN.nonzero().unbind(1)
        if len(token_R) != rows:
            raise ValueError(f"the routing map has {len(token_R)} assignments of {tokens} tokens, not {rows}")
    places_R = token_R.argsort(stable=True)
    starts_N = None
    if per_token is None:
        counts_N = map_NE.sum(dim=1)
        starts_N = (counts_N.cumsum(0) - counts_N).int()
    fan = Fan(tokens, token_R.int(), places_R.int(), starts_N)
    return Permutation(fan, (token_R * columns + column_R).int())


def chunk_order(counts_SC: Tensor, rows: int) -> Fan:
    """From rows sorted by source and then by column, to rows sorted by column and then by source.

    Args:
        counts_SC: rows of every source and column.
        rows: their sum; given, so that nobody waits for the device.
    """
    counts_CS = counts_SC.t().reshape(-1)
    before_SC = (counts_SC.reshape(-1).cumsum(0) - counts_SC.reshape(-1)).view_as(counts_SC)
    after_CS = (counts_CS.cumsum(0) - counts_CS).view(counts_SC.shape[1], -1)
    shift_SC = after_CS.t() - before_SC
    here = torch.arange(rows, device=counts_SC.device)
    places_R = here + shift_SC.reshape(-1).repeat_interleave(counts_SC.reshape(-1), output_size=rows)
    source_R = here - shift_SC.t().reshape(-1).repeat_interleave(counts_CS, output_size=rows)
    return Fan(rows, source_R.int(), places_R.int(), None)
