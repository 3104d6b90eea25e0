"""--moe-domain-grouped: the exchange of a layer among the ranks that hold the experts of the same domains.

The expert-parallel group is cut into groups of neighbouring ranks (`config/domain_placement.py`), and every rank reads
sequences of its group's domains (`data/domain_stream.py`). So the dispatchers of the whole group work on a part of it,
with the part's experts: they have no wire to any other rank. With D domains of equal size an all-to-all among P ranks
becomes one among P / D, and with a rank for each domain there is none.

That every token has its expert in the group is a promise of the data, which is checked: a token of another domain has
no expert among those that the dispatcher knows, and the run ends.

Shape legend: N = tokens of this rank, E = experts of the layer, H = hidden size.
"""

import copy
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_moe.config.base import UserError
from megatron_moe.config.domain_placement import DomainRanks, cut_into_domains, shares_of
from megatron_moe.config.routing import domain_groups
from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher
from megatron_moe.moe.dispatch.grouped import GroupedDispatcher
from megatron_moe.moe.expert_parallel import groups_among


def domain_dispatcher(
    num_local_experts: int, local_expert_indices: Sequence[int], config: Any, pg_collection: ProcessGroupCollection
) -> MoETokenDispatcher:
    """The dispatcher of a layer; a collective of the ranks that exchange with each other.

    Args:
        num_local_experts: of this rank.
        local_expert_indices: their numbers in the layer.
        config: of the layer.
        pg_collection: with the whole expert-parallel group.
    """
    own, pg_collection = own_domains(config, pg_collection)
    experts = own.experts(config.num_moe_experts)
    part = copy.copy(config)
    part.num_moe_experts, part.expert_model_parallel_size = len(experts), len(own.ranks)
    indices = [expert - experts.start for expert in local_expert_indices]
    kind = GroupedDomains if len(own.ranks) > 1 else OneRankDomains
    return kind(num_local_experts, indices, part, pg_collection, whole=config, own=own)


def own_domains(config: Any, pg_collection: ProcessGroupCollection) -> tuple[DomainRanks, ProcessGroupCollection]:
    """This rank's domains with the ranks that hold their experts, and the process groups of these ranks."""
    groups = cut_into_domains(shares_of(config.domains, config.routing), pg_collection.ep.size())
    own = next(group for group in groups if pg_collection.ep.rank() in group.ranks)
    if len(groups) > 1:
        pg_collection = groups_among(pg_collection, own.ranks, timedelta(minutes=config.distributed_timeout_minutes))
    return own, pg_collection


class _OwnDomains(MoETokenDispatcher):
    """What stands before a dispatcher of a group: it is shown the experts of the group only."""

    def __init__(self, *args: Any, whole: Any, own: DomainRanks) -> None:
        super().__init__(*args)
        self._whole = whole
        self._domains = own.domains
        experts = own.experts(whole.num_moe_experts)
        self._experts = slice(experts.start, experts.stop)

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """As the dispatcher's, of maps [N, E] over all experts of the layer."""
        own = self._experts
        prepared: tuple[Tensor, Tensor] = super().dispatch_preprocess(tokens, routing_map[:, own], probs[:, own])
        return prepared

    def _check(self, map_NE: Tensor, routed: int) -> None:
        """Every token has one expert (random-routed is top-1); so many have it in this group.

        Raises:
            UserError: some have not.
        """
        if routed == len(map_NE):
            return
        counts_E = map_NE.sum(dim=0).tolist()
        groups = domain_groups(len(counts_E), self._whole.domains, self._whole.routing.router_domain_shares)
        found = [
            f"{count} of domain {domain}"
            for domain, experts in enumerate(groups)
            if domain not in self._domains and (count := sum(counts_E[experts.start : experts.stop]))
        ]
        several = "s" if len(self._domains) > 1 else ""
        raise UserError(
            f"--moe-domain-grouped: rank {dist.get_rank()} holds experts of domain{several} "
            f"{', '.join(map(str, self._domains))} and was given tokens of others, {', '.join(found)} among "
            f"{len(map_NE)} tokens; give every rank sequences of its own domains"
        )


class GroupedDomains(_OwnDomains, GroupedDispatcher):
    """Domains on several ranks."""

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """As the dispatcher's, of maps [N, E] over all experts of the layer."""
        self._map_NE: Tensor | None = routing_map
        return super().dispatch_preprocess(tokens, routing_map, probs)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """As the dispatcher's. The counts that the host has waited for show whether a token has stayed behind."""
        dispatched = super().token_dispatch(hidden_states, probs)
        (sent, _), *_ = self._counts.levels
        assert self._map_NE is not None
        self._check(self._map_NE, sum(sent))
        self._map_NE = None
        return dispatched


class OneRankDomains(_OwnDomains, AllToAllDispatcher):
    """Domains on one rank: nothing travels."""

    def dispatch_preprocess(self, tokens: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """As the dispatcher's, of maps [N, E] over all experts of the layer. The host waits once, for the check."""
        self._check(routing_map, int(routing_map[:, self._experts].sum()))
        return super().dispatch_preprocess(tokens, routing_map, probs)
