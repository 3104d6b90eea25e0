"""Random Routed Experts (PanGu-Sigma): the domain decides on a group of experts, a fixed random map on one of them.

`expert = first(domain) + r(domain, token id)`, where `r` is drawn for every layer and domain. The combine weight is 1
and there is no auxiliary loss. A domain's experts are neighbours, so that they can lie on ranks of their own, and be
cut out of the model with all that belongs to the domain.

Shape legend: N = tokens, V = token ids, D = domains.
"""

import torch
from torch import Tensor

from megatron_moe.config.routing import domain_groups
from megatron_moe.moe.routers.base import RouterStart
from megatron_moe.moe.routers.fixed import FixedMapRouter


class RandomRoutedRouter(FixedMapRouter):
    """`token_map` is [D * V, 1]: a row for every domain and token id, with the number of an expert of the layer."""

    def rows(self) -> int:
        """D * V."""
        return int(self.config.domains * self.config.vocab_rows)

    def draw(self, start: RouterStart) -> Tensor:
        """The map, a domain after the other."""
        counts = start.token_counts
        groups = domain_groups(self.experts, self.config.domains, self.config.routing.router_domain_shares)
        maps = []
        for domain, group in enumerate(groups):
            counts_V = counts[domain] if counts is not None and counts.dim() > 1 else counts
            maps.append(group.start + self.draw_one(start, counts_V, len(group), domain))
        return torch.cat(maps)

    def lookup(self) -> Tensor:
        """[N, 1]."""
        assert self.inputs is not None
        return self.token_map[self.inputs.domain * int(self.config.vocab_rows) + self.inputs.token]
