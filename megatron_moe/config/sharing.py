"""Checks of the routers that share the experts out among all tokens: recycle, base, expert-choice."""

from megatron_moe.config.base import ConfigError, require
from megatron_moe.config.moe import MoEConfig


def check_sharing(moe: MoEConfig) -> None:
    """Refuse what these routers cannot do.

    Raises:
        ConfigError: names the flag, its value and what would be right.
    """
    if moe.router == "recycle":
        if moe.moe_expert_capacity_factor is None:
            raise ConfigError("--router recycle: needs --moe-expert-capacity-factor")
        # A token that is worked on by several experts could get one that it has already.
        require(moe.moe_router_topk == 1, "moe_router_topk", moe.moe_router_topk, "1 with --router recycle")
    if moe.router == "base":
        require(moe.moe_router_topk == 1, "moe_router_topk", moe.moe_router_topk, "1 with --router base")
    if moe.router == "expert-choice":
        # megatron/core/transformer/moe/token_dispatcher.py:_DeepepManager keeps exactly top-k experts of each token.
        kind = moe.moe_token_dispatcher_type
        require(kind != "flex", "moe_token_dispatcher_type", kind, "alltoall or allgather with --router expert-choice")
