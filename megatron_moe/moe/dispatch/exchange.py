"""Sends rows to the ranks that need them, in one or two levels, and sums what comes back: two linear maps.

`spread` copies each row once to every destination of a level (a node, or a rank) that has one of its experts, and is
applied level after level. `collect` is its transpose: rows travel back, and those of one row are summed, so that a row
crosses a level once in each direction, however many experts lie behind it. The gradient of one is the other.

A `Wire` is a process group with what is known of the links to its ranks; all rows go through `Wire.exchange`, which is
where they are counted (`counters.py`). A `Level` says which rows go where at one level. The counts of all levels are
known before any row travels (`exchange_counts`): one small exchange a level, then the host waits once for all of them,
because the sizes of a message must be numbers.

Sums are taken in the order of ranks, in fp32, and rounded to the rows' type once a level.

Shape legend: N = rows at hand, D = destinations of a level, R = rows to send, G = rows received, H = hidden size,
C = experts behind one destination, P = D * C experts known at this level.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.dispatch.counters import Phase, is_counting, record
from megatron_moe.moe.dispatch.nodes import links
from megatron_moe.moe.dispatch.permutation import Permutation, permutation

NOT_ROUTED = float("-inf")
"""Stands in a row's weights for an expert that does not get it; no router gives it."""


class Wire:
    """Exchanges rows between the ranks of a group, and counts them when asked to."""

    def __init__(self, group: dist.ProcessGroup, per_node: int) -> None:
        self.group = group
        self.size = group.size()
        self.links = links(dist.get_process_group_ranks(group), per_node, dist.get_rank())

    def exchange(
        self,
        rows: Tensor,
        send: Sequence[int],
        receive: Sequence[int],
        phase: Phase,
        *,
        backward: bool,
        metadata: int,
    ) -> Tensor:
        """All-to-all of rows, without a gradient.

        Args:
            rows: sorted by receiver, on the first dimension.
            send: rows for each rank of the group.
            receive: rows from each rank.
            phase: what the exchange is for.
            backward: whether it carries gradients.
            metadata: bytes of a row that are not its hidden numbers.

        Returns:
            Received rows, sorted by sender.
        """
        if is_counting():
            width = rows[:1].numel() * rows.element_size() if len(rows) else 0
            record(phase, backward, self.links, send, width - metadata if width else 0, metadata)
        if self.size == 1:
            return rows
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), list(receive), list(send), group=self.group)
        return received

    def exchange_counts(self, table: Tensor) -> Tensor:
        """All-to-all of one row of numbers for each rank; the host does not wait."""
        if is_counting():
            record(Phase.COUNTS, False, self.links, [1] * self.size, 0, table[0].numel() * table.element_size())
        if self.size == 1:
            return table
        received = torch.empty_like(table)
        dist.all_to_all_single(received, table.contiguous(), group=self.group)
        return received

    def gather_counts(self, row: Tensor) -> Tensor:
        """One row of numbers, [1, K], of every rank; counted as if each rank sent to each. The host does not wait."""
        if is_counting():
            record(Phase.COUNTS, False, self.links, [1] * self.size, 0, row.numel() * row.element_size())
        gathered = row.new_empty((self.size, row.shape[1]))
        dist.all_gather_into_tensor(gathered, row, group=self.group)
        return gathered


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, wire: Wire, send: list[int], receive: list[int], phase: Phase, metadata: int
    ) -> Tensor:
        ctx.where = (wire, send, receive, phase, metadata)
        return wire.exchange(rows, send, receive, phase, backward=False, metadata=metadata)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wire, send, receive, phase, metadata = ctx.where
        back = wire.exchange(gradients[0], receive, send, phase, backward=True, metadata=metadata)
        return back, None, None, None, None, None


def exchange_rows(
    rows: Tensor, wire: Wire, send: Sequence[int], receive: Sequence[int], phase: Phase, metadata: int = 0
) -> Tensor:
    """`Wire.exchange` with a gradient, which travels the other way."""
    if wire.size == 1 and not is_counting():
        return rows
    moved: Tensor = _Exchange.apply(rows, wire, list(send), list(receive), phase, metadata)
    return moved


@dataclass(frozen=True)
class Level:
    """Rows that travel at one level.

    Attributes:
        wire: to its D destinations.
        order: of the N x D map of rows to destinations, sorted by destination: what is sent, [R].
        send: rows to each destination.
        receive: rows from each.
    """

    wire: Wire
    order: Permutation
    send: tuple[int, ...]
    receive: tuple[int, ...]

    def forth(
        self, rows_NH: Tensor, weights_NP: Tensor | None, phase: Phase, *, backward: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Rows at their destinations, [G, H], and, in the same message, their weights there, [G, C]."""
        if weights_NP is None:
            sent = self.order.fan.copy(rows_NH)
            return self.wire.exchange(sent, self.send, self.receive, phase, backward=backward, metadata=0), None
        weights_DC = weights_NP.reshape(len(rows_NH) * self.wire.size, weights_NP.shape[1] // self.wire.size)
        message = Message(rows_NH, weights_DC, sum(self.send))
        self.order.fan.copy(rows_NH, out=message.rows)
        torch.index_select(weights_DC, 0, self.order.address_R, out=message.weights)
        return message.moved(self.wire, self.send, self.receive, phase, backward=backward)

    def back(
        self, rows_GH: Tensor, weights_GC: Tensor | None, phase: Phase, *, backward: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The transpose: for each of N rows the sum of its copies, [N, H]; weights return to their places, [N, P]."""
        where = (self.receive, self.send, phase)
        if weights_GC is None:
            rows_RH = self.wire.exchange(rows_GH, *where, backward=backward, metadata=0)
            return self.order.fan.sum(rows_RH), None
        message = Message(rows_GH, weights_GC, len(rows_GH))
        message.rows.copy_(rows_GH)
        message.weights.copy_(weights_GC)
        rows_RH, weights_RC = message.moved(self.wire, *where, backward=backward)
        slots = weights_GC.new_zeros((self.order.fan.rows * self.wire.size, weights_GC.shape[1]))
        slots.index_copy_(0, self.order.address_R.long(), weights_RC)
        return self.order.fan.sum(rows_RH), slots.view(self.order.fan.rows, self.wire.size * weights_GC.shape[1])


class Message:
    """Rows and their weights side by side in one buffer of bytes, so that they travel together."""

    def __init__(self, rows: Tensor, weights: Tensor, count: int) -> None:
        self._types = (rows.dtype, weights.dtype)
        self._widths = (rows.shape[1], weights.shape[1])
        self.metadata = weights.shape[1] * weights.element_size()
        used = self.metadata + rows.shape[1] * rows.element_size()
        # So that every row can be read as either type.
        unit = max(rows.element_size(), weights.element_size())
        self._buffer = torch.empty((count, -(-used // unit) * unit), dtype=torch.uint8, device=rows.device)
        self.rows, self.weights = self._views(self._buffer)

    def _views(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        (rows_type, weights_type), (width, columns) = self._types, self._widths
        start = self.metadata // rows_type.itemsize
        return buffer.view(rows_type)[:, start : start + width], buffer.view(weights_type)[:, :columns]

    def moved(
        self, wire: Wire, send: Sequence[int], receive: Sequence[int], phase: Phase, *, backward: bool
    ) -> tuple[Tensor, Tensor]:
        """Rows and weights that other ranks sent; views of one buffer."""
        return self._views(wire.exchange(self._buffer, send, receive, phase, backward=backward, metadata=self.metadata))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_NH: Tensor, weights_NP: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        ctx.level = level
        rows_GH, weights_GC = level.forth(rows_NH, weights_NP, Phase.DISPATCH, backward=False)
        assert weights_GC is not None
        return rows_GH, weights_GC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return *ctx.level.back(*gradients, Phase.DISPATCH, backward=True), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_GH: Tensor, level: Level) -> Tensor:
        ctx.level = level
        return level.back(rows_GH, None, Phase.COMBINE, backward=False)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows: Tensor = ctx.level.forth(gradients[0], None, Phase.COMBINE, backward=True)[0]
        return rows, None


def spread(rows_NH: Tensor, weights_NP: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Each row once at every destination that has one of its experts: [G, H], and its weights there, [G, C].

    Args:
        rows_NH: rows of any type.
        weights_NP: of the experts behind all destinations, destination by destination; `NOT_ROUTED` where an expert
            does not get the row.
        level: where they go.
    """
    moved: tuple[Tensor, Tensor] = _Spread.apply(rows_NH, weights_NP, level)
    return moved


def collect(rows_GH: Tensor, level: Level) -> Tensor:
    """The transpose of `spread` for the rows: those that were copies of one row come back as one, summed: [N, H]."""
    summed: Tensor = _Collect.apply(rows_GH, level)
    return summed


def make_level(wire: Wire, weights_NP: Tensor, send: Sequence[int], receive: Sequence[int]) -> Level:
    """The level over `wire` for rows with these weights; the numbers of rows are known to the host (`Counts`)."""
    with torch.no_grad():
        routed_ND = (weights_NP != NOT_ROUTED).unflatten(1, (wire.size, weights_NP.shape[1] // wire.size)).any(dim=2)
        return Level(wire, permutation(routed_ND, sum(send)), tuple(send), tuple(receive))


@dataclass(frozen=True)
class Counts:
    """Numbers of rows, on the host.

    Attributes:
        levels: for every level, rows to send to and to receive from each destination.
        received: rows after the last level, on each rank that shares this rank's experts.
        routed: assignments of all these rows to the experts.
    """

    levels: tuple[tuple[list[int], list[int]], ...]
    received: list[int]
    routed: int


def exchange_counts(wires: Sequence[Wire], map_NE: Tensor, beside: Wire | None = None) -> Counts:
    """How many rows will travel at each level. The host waits once, at the end.

    Args:
        wires: of the levels: one of all ranks, or one between nodes and one inside of them.
        map_NE: [N, E] bool, experts in the order of the ranks that have them.
        beside: to the ranks that share this rank's experts (expert tensor parallelism), if there are others.
    """
    experts = map_NE.shape[1]
    ranks = math.prod(wire.size for wire in wires)
    by_rank = map_NE.unflatten(1, (ranks, experts // ranks))
    # For each rank: rows that it gets, and assignments to its experts.
    table_P2 = torch.stack([by_rank.any(dim=2).sum(dim=0), by_rank.sum(dim=(0, 2))], dim=1)
    parts: list[Tensor] = []
    if len(wires) == 2:
        # What a node's rank gets from here, and what it will have to pass on for this rank's tokens.
        between = wires[0]
        rows_Q = map_NE.unflatten(1, (between.size, experts // between.size)).any(dim=2).sum(dim=0)
        arrived = between.exchange_counts(torch.cat([rows_Q[:, None], table_P2.view(between.size, -1)], dim=1))
        parts += [rows_Q, arrived[:, 0]]
        table_P2 = arrived[:, 1:].sum(dim=0).view(-1, 2)
    received = wires[-1].exchange_counts(table_P2)
    parts += [table_P2[:, 0], received[:, 0]]
    totals = received.sum(dim=0)[None]
    if beside is not None:
        totals = beside.gather_counts(totals)
    numbers = torch.cat([*parts, *totals.unbind(1)]).tolist()
    lists = []
    for part in (*parts, totals, totals):
        lists.append(numbers[: len(part)])
        numbers = numbers[len(part) :]
    *sizes, rows, routed = lists
    return Counts(tuple(zip(sizes[::2], sizes[1::2], strict=True)), rows, sum(routed))
