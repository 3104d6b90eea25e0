"""How many tokens an expert accepts, and which of them when more want it.

Upstream's rule (`megatron/core/transformer/moe/moe_utils.py:get_capacity`, `apply_router_token_dropping`), with a
lower bound and two more policies. A rank counts its own tokens, as upstream does.

Shape legend: N = tokens of this rank, E = experts, C = capacity of an expert.
"""

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity
from torch import Tensor

from megatron_moe.moe.inputs import RoutingInputs
from megatron_moe.moe.token_random import token_expert_uniform


def expert_capacity(tokens: int, topk: int, experts: int, factor: float, minimum: int = 0) -> int:
    """C = max(ceil(tokens * topk / experts * factor), minimum), and never more than the tokens there are."""
    return min(tokens, get_capacity(tokens * topk, experts, factor, minimum))


@torch.no_grad()
def keep_within_capacity(map_NE: Tensor, priority_NE: Tensor, capacity: int, *, padded: bool) -> Tensor:
    """The map without what an expert has no room for.

    Args:
        map_NE: who wants to go where (bool).
        priority_NE: an expert takes the `capacity` tokens of the highest priority. What is not in the map must be
            lower than all that is.
        capacity: of each expert, at most N.
        padded: fill every expert up to its capacity with tokens that do not want it.
    """
    if capacity >= map_NE.shape[0]:
        return torch.ones_like(map_NE) if padded else map_NE
    taken_CE = torch.topk(priority_NE, k=capacity, dim=0, sorted=False).indices
    room_NE = torch.zeros_like(map_NE).scatter(0, taken_CE, True)
    return room_NE if padded else map_NE & room_NE


@torch.no_grad()
def priority_by_position(map_NE: Tensor) -> Tensor:
    """The first come first.

    Upstream's own `position` policy takes the top k of a column of zeros and ones: which of the equal ones that keeps
    is up to the kernel.
    """
    count = map_NE.shape[0]
    places_N = torch.arange(count, 0, -1, device=map_NE.device)
    return (places_N[:, None] + map_NE * count).float()


@torch.no_grad()
def priority_at_random(map_NE: Tensor, inputs: RoutingInputs, *keys: int) -> Tensor:
    """Any order, the same under recompute: random token selection (DeepSpeed-MoE, PAI GPT-MoE).

    The released code keeps the top C of `M * U(0, 1)`. `keys` as (seed, purpose, step, layer).
    """
    return token_expert_uniform(inputs, map_NE.shape[1], *keys) + map_NE
