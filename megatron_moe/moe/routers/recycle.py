"""Recycle routing (Hunyuan-Large, arXiv 2411.02265): tokens that find their expert full go to one that has room.

Top-1 with a capacity of C = ceil(M / E * factor) tokens of the micro-batch. Tokens beyond it are not dropped but given
at random to the places that are left, each place equally likely: nobody is dropped while C * E >= M, and no expert
gets more than C. A recycled token's output is weighed by the probability of its new expert, as in the released code;
the others are routed as by plain top-1, and the balancing loss is that of the choice before recycling.

Shape legend: S = sequence on this rank, B = batch, N = S * B tokens of this rank, M = tokens of the micro-batch, E =
experts of this layer, C = capacity of an expert, O = tokens beyond it, F = free places.
"""

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_moe.moe.capacity import expert_capacity
from megatron_moe.moe.micro_batch import WholeMicroBatch
from megatron_moe.moe.routers.topk import DROPPING, TopKRouter
from megatron_moe.moe.token_random import hashed, token_uniform

# What random numbers are for: the second of their keys.
RECYCLING, PLACES = 4, 5


class RecycleRouter(TopKRouter):
    """Top-1 with a capacity in training and no token lost to it; plain top-1 elsewhere.

    Which tokens are beyond the capacity, --moe-token-drop-policy says: the least probable, the last, or any.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        # The dispatcher, which is made of the layer's own config, must know that tokens may be dropped after all.
        router_config = copy.copy(config)
        router_config.moe_expert_capacity_factor = None
        super().__init__(router_config, pg_collection, is_mtp_layer)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route.

        Args:
            logits: [S, B, E].
            padding_mask: must be None; sequences are packed.

        Returns:
            Weights [N, E] and the routing map [N, E] (bool), at most one expert for each token.
        """
        probs_NE, wanted_NE = super().routing(logits, padding_mask)
        if not self.training:
            return probs_NE, wanted_NE
        expert_N = self._experts(probs_NE, wanted_NE)
        map_NE = torch.arange(wanted_NE.shape[1], device=logits.device) == expert_N[:, None]
        moved_NE = map_NE & ~wanted_NE
        # What differs from the choice, which is counted already.
        self.count(map_NE.int() - wanted_NE.int(), dropped=(expert_N < 0).sum(), recycled=moved_NE.sum())
        return probs_NE * map_NE + self._scores(logits.view_as(probs_NE)) * moved_NE, map_NE

    def _scores(self, logits_NE: Tensor) -> Tensor:
        """The weights that the experts would have, chosen or not."""
        softmax = self.score_function == "softmax"
        scores_NE = torch.softmax(logits_NE, dim=1) if softmax else torch.sigmoid(logits_NE)
        return scores_NE * (self.config.moe_router_topk_scaling_factor or 1.0)

    @torch.no_grad()
    def _experts(self, probs_NE: Tensor, wanted_NE: Tensor) -> Tensor:
        """The expert [N] that each token gets, -1 for none."""
        whole, experts = WholeMicroBatch.of(self), wanted_NE.shape[1]
        moe = self.config.moe
        assert moe.moe_expert_capacity_factor is not None
        capacity = expert_capacity(whole.size, 1, experts, moe.moe_expert_capacity_factor, moe.moe_min_capacity)
        match self.config.moe_token_drop_policy:
            case "probs":
                order_M = whole.gather(probs_NE.sum(dim=1)).argsort(descending=True, stable=True)
            case "position":
                order_M = torch.arange(whole.size, device=probs_NE.device)
            case "random":
                order_M = token_uniform(whole.inputs, *self._random_keys(DROPPING)).argsort()
            case other:
                raise ValueError(f"--moe-token-drop-policy {other}")
        wanted_M = whole.gather(wanted_NE.int().argmax(dim=1))
        # A step has many micro-batches: the first token tells them apart.
        first = whole.inputs.sample[0]
        place_F = torch.arange(experts * capacity, device=probs_NE.device)
        return whole.mine(
            recycled(
                wanted_M,
                experts,
                capacity,
                order_M=order_M,
                token_M=token_uniform(whole.inputs, *self._random_keys(RECYCLING)),
                place_F=hashed(*self._random_keys(PLACES), first, place_F),
            )
        )


def recycled(
    wanted_M: Tensor, experts: int, capacity: int, *, order_M: Tensor, token_M: Tensor, place_F: Tensor
) -> Tensor:
    """The expert [M] of every token, -1 for none: its own while there is room, else a free place drawn at random.

    Args:
        wanted_M: the expert that every token would go to.
        experts: E.
        capacity: C.
        order_M: the tokens, those first that are to keep their expert.
        token_M: random numbers of the tokens: the order in which those without an expert draw.
        place_F: random numbers of as many places as there may be: the order in which free ones are drawn.
    """
    sorted_M = order_M[wanted_M[order_M].argsort(stable=True)]
    count_E = torch.bincount(wanted_M, minlength=experts)
    before_E = count_E.cumsum(0) - count_E
    rank_M = torch.arange(wanted_M.numel(), device=wanted_M.device) - before_E[wanted_M[sorted_M]]
    over_O = sorted_M[rank_M >= capacity]
    over_O = over_O[token_M[over_O].argsort()]
    free_E = (capacity - count_E).clamp(min=0)
    free_F = torch.arange(experts, device=wanted_M.device).repeat_interleave(free_E)
    free_F = free_F[place_F[: free_F.numel()].argsort()]
    placed = min(over_O.numel(), free_F.numel())
    expert_M = wanted_M.clone()
    expert_M[over_O[:placed]] = free_F[:placed]
    expert_M[over_O[placed:]] = -1
    return expert_M
