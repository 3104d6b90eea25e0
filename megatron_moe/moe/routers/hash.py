"""Hash layers (Roller et al. 2021): a token's experts follow from its id alone, by a fixed random map of the layer.

With K experts a token (--moe-router-topk) they are K different ones, each weighted 1 / K.

Shape legend: N = tokens, V = token ids, K = experts of a token.
"""

from torch import Tensor

from megatron_moe.moe.routers.base import RouterStart
from megatron_moe.moe.routers.fixed import FixedMapRouter


class HashRouter(FixedMapRouter):
    """`token_map` is [V, K]."""

    def rows(self) -> int:
        """V."""
        return int(self.config.vocab_rows)

    def draw(self, start: RouterStart) -> Tensor:
        """The map [V, K]."""
        return self.draw_one(start, start.token_counts, self.experts)

    def lookup(self) -> Tensor:
        """[N, K]."""
        assert self.inputs is not None
        return self.token_map[self.inputs.token]
