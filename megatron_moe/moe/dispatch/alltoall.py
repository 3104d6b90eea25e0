"""The dispatcher `alltoall`: upstream's exchange, with gathers in place of its permutations.

Extends `megatron/core/transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher`. The same rows travel, and on a
CPU results are the same bit for bit; a GPU adds a token's rows in any order upstream, here in that of the experts.
Upstream's own code runs where capacity is padded.

Upstream's permutation sorts all N x E entries of the map, and sorts a rank's rows by a Python loop over chunks, which
it does with one rank as well, where they are in order already. Here an order is two passes over the map, and each way
one gather.

Shape legend: N = tokens of this rank, E = experts, R = routed rows of this rank, G = rows that it received.
"""

from typing import Any

import torch.distributed as dist
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from megatron_moe.moe.dispatch.counters import Phase, is_counting, record
from megatron_moe.moe.dispatch.exchange import Wire, exchange_rows
from megatron_moe.moe.dispatch.expert_tensor import gather_rows, reduce_scatter_rows
from megatron_moe.moe.dispatch.nodes import links, ranks_per_node
from megatron_moe.moe.dispatch.permutation import Fan, Permutation, chunk_order, copy_rows, permutation, sum_rows


class AllToAllDispatcher(MoEAlltoAllTokenDispatcher):
    """One exchange over all ranks of the expert-parallel group."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._per_node = ranks_per_node(self.config.ranks_per_node)
        self._wire = Wire(self.ep_group, self._per_node)
        self._alone = self.tp_size * self.ep_size == 1 and not self.drop_and_pad
        self._permutation: Permutation
        self._chunks: Fan | None = None

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Upstream's counts; what it gathers for them is counted as if each rank sent to each."""
        if is_counting() and not self.drop_and_pad and self.tp_size * self.ep_size > 1:
            ranks = dist.get_process_group_ranks(self.tp_ep_group)
            record(
                Phase.COUNTS,
                False,
                links(ranks, self._per_node, dist.get_rank()),
                [1] * len(ranks),
                0,
                self.num_experts * 8,
            )
        counts_E: Tensor = super().preprocess(routing_map)
        return counts_E

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows sorted by expert, [R, H], and their weights, [R]."""
        if self.drop_and_pad:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape = hidden_states.shape
        self._sum_type = probs.dtype
        dropless = self.config.moe_expert_capacity_factor is None
        if self._alone:
            # Nothing travels, so nothing need reach the host but the number of rows, where that is not known.
            self.tokens_per_expert = routing_map.sum(dim=0)
            self.num_out_tokens = (
                len(routing_map) * self.config.moe_router_topk if dropless else self.tokens_per_expert.sum().item()
            )
        else:
            self.tokens_per_expert = self.preprocess(routing_map)
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_1", self.tokens_per_expert)
        self._permutation = permutation(
            routing_map, int(self.num_out_tokens), self.config.moe_router_topk if dropless else None
        )
        tokens_NH = hidden_states.view(-1, self.hidden_shape[-1])
        return copy_rows(tokens_NH, self._permutation.fan), self._permutation.pick(probs)

    def token_dispatch(self, permutated_local_input_tokens: Tensor, permuted_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows for this rank's experts, sorted by the rank that they come from, and their weights."""
        if self._alone:
            return permutated_local_input_tokens, permuted_probs
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        send, receive = self._splits(permutated_local_input_tokens)
        rows = exchange_rows(permutated_local_input_tokens, self._wire, send, receive, Phase.DISPATCH)
        weights = exchange_rows(
            permuted_probs, self._wire, send, receive, Phase.DISPATCH, metadata=permuted_probs.element_size()
        )
        return rows, weights

    def token_combine(
        self, hidden_states: Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> Tensor:
        """The experts' rows on the rank whose tokens they are, in the order in which it sent them."""
        if self._alone:
            return hidden_states
        send, receive = self._splits(hidden_states)
        return exchange_rows(hidden_states, self._wire, receive, send, Phase.COMBINE)

    def _splits(self, rows: Tensor) -> tuple[list[int], list[int]]:
        """Rows to each rank and from each in the dispatch. Padded: all equal. One rank: all."""
        if self.input_splits is None:
            equal = [len(rows) // self.ep_size] * self.ep_size
            return equal, equal
        return self.input_splits.tolist(), self.output_splits.tolist()

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Received rows sorted by this rank's experts, [G, H], the rows of each of them, and their weights, [G]."""
        if self.drop_and_pad:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        if self._alone:
            return global_input_tokens, self.tokens_per_expert, global_probs
        if self.tp_size > 1:
            sizes = self.output_splits_tp.tolist()
            global_input_tokens = gather_rows(global_input_tokens, self.tp_group, sizes)
            global_probs = gather_rows(global_probs, self.tp_group, sizes)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_permutation_2", self.tokens_per_expert)
        self._chunks = None
        if self.num_local_experts > 1:
            rows = global_input_tokens.shape[0]
            counts = self.num_global_tokens_per_local_expert.to(global_input_tokens.device, non_blocking=True)
            self._chunks = chunk_order(counts, rows)
            global_input_tokens = copy_rows(global_input_tokens, self._chunks)
            global_probs = copy_rows(global_probs.unsqueeze(1), self._chunks).squeeze(1)
        counts_E = self._maybe_dtoh_and_synchronize("before_finish", self.tokens_per_expert)
        return global_input_tokens, counts_E, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts' rows in the order in which they came, [G, H]."""
        if self.drop_and_pad:
            return super().combine_preprocess(hidden_states)
        if self._alone:
            return hidden_states
        if self._chunks is not None:
            hidden_states = sum_rows(hidden_states, self._chunks)
        if self.tp_size > 1:
            hidden_states = reduce_scatter_rows(
                hidden_states, self.tp_group, self.output_splits_tp.tolist(), self._sum_type
            )
        return hidden_states

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """For every token the sum over its experts, in the shape of the input."""
        if self.drop_and_pad:
            return super().combine_postprocess(permutated_local_input_tokens)
        output_NH = sum_rows(permutated_local_input_tokens, self._permutation.fan)
        # Autograd keeps what the backward pass needs; under recompute that is nothing.
        del self._permutation
        self._chunks = self.probs = self.routing_map = None
        return output_NH.view(self.hidden_shape)
