"""The dispatcher `grouped`: an exchange between nodes, then one inside of each node; a token goes once to each.

With P ranks on nodes of m: a rank sends every token once to each node that has one of its experts, to the rank of its
own place there, which passes it on, once, to each rank of the node that has one. That is P/m - 1 messages between nodes
instead of P - m, and one copy of a row instead of one for each expert there. What the experts make of it, their weights
already in it, is summed on the way back: per rank, then per node, then per token. With one node, or one rank a node,
one level is left, which still sends a row once to each rank.

Equal to `alltoall` but for rounding. In fp32 a token's k terms are added in another order. In bf16 the sum over a
rank's experts and the sum over a node's ranks are each rounded once more before the last one, so that an output, or an
input's gradient, may be off by 2 u sum|y| more, with u = 2^-8 and y the token's k terms. Partial sums in fp32 would
take that away, for twice the bytes of the combine and of the dispatch's gradient.

Kept for the backward pass, beside what `permutation.py` says of the rows of this rank's experts: 12 bytes for each row
sent at a level and 4 for each row at hand there; no hidden row.

Shape legend: N = tokens of this rank, E = experts of the layer, L = experts of this rank, G = rows that it received,
R = their assignments to its experts, H = hidden size.
"""

from collections.abc import Sequence
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_moe.moe.dispatch.exchange import (
    NOT_ROUTED,
    Counts,
    Level,
    Wire,
    collect,
    exchange_counts,
    make_level,
    spread,
)
from megatron_moe.moe.dispatch.expert_tensor import gather_rows, reduce_scatter_rows
from megatron_moe.moe.dispatch.nodes import groups_of_levels, ranks_per_node
from megatron_moe.moe.dispatch.permutation import Permutation, copy_rows, permutation, sum_rows


class GroupedDispatcher(MoETokenDispatcher):
    """Two exchanges, between nodes and inside of them."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: Sequence[int],
        config: Any,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Make the groups; all ranks of the expert-parallel group together.

        Args:
            num_local_experts: of this rank.
            local_expert_indices: their numbers in the layer: those of rank r follow those of rank r - 1.
            config: of the layer.
            pg_collection: with `ep`, `expt_tp` and `tp_ep`.

        Raises:
            ConfigError: nodes hold different numbers of the group's ranks.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        assert local_expert_indices[0] == self.ep_rank * num_local_experts
        per_node = ranks_per_node(config.ranks_per_node)
        groups = groups_of_levels(config, self.ep_group)
        self._wires = tuple(Wire(group, per_node) for group in groups)
        self._beside = Wire(self.tp_group, per_node) if self.tp_size > 1 else None
        self._levels: list[Level] = []
        self._counts: Counts
        self._permutation: Permutation

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, H] as they are, and their weights [N, E] with `NOT_ROUTED` for experts that they do not go to."""
        self.hidden_shape = tokens.shape
        self.routing_map = routing_map
        self._sum_type = probs.dtype
        return tokens.view(-1, self.hidden_shape[-1]), probs.masked_fill(~routing_map, NOT_ROUTED)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows with experts on this rank, [G, H], and their weights, [G, L]. The host waits once, for the counts."""
        self._counts = exchange_counts(self._wires, self.routing_map, self._beside)
        self._levels = []
        for wire, (send, receive) in zip(self._wires, self._counts.levels, strict=True):
            level = make_level(wire, probs, send, receive)
            self._levels.append(level)
            hidden_states, probs = spread(hidden_states, probs, level)
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows sorted by expert, [R, H], how many each has, and their weights, [R]."""
        if self.tp_size > 1:
            hidden_states = gather_rows(hidden_states, self.tp_group, self._counts.received)
            probs = gather_rows(probs, self.tp_group, self._counts.received)
        map_GL = probs != NOT_ROUTED
        self._permutation = permutation(map_GL, self._counts.routed)
        rows_RH = copy_rows(hidden_states, self._permutation.fan)
        return rows_RH, map_GL.sum(dim=0), self._permutation.pick(probs)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """For each row the sum over this rank's experts, [G, H]."""
        summed = sum_rows(hidden_states, self._permutation.fan)
        if self.tp_size > 1:
            summed = reduce_scatter_rows(summed, self.tp_group, self._counts.received, self._sum_type)
        return summed

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """For each token the sum over all ranks, [N, H]."""
        for level in reversed(self._levels):
            hidden_states = collect(hidden_states, level)
        # Autograd keeps what the backward pass needs; under recompute that is nothing.
        del self._permutation, self.routing_map
        self._levels = []
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """The input's shape."""
        return hidden_states.view(self.hidden_shape)
