"""The update of the aux-loss-free expert bias, for layers with different expert counts.

Upstream stacks the biases of all layers into one tensor and crashes when counts differ
(`megatron/core/distributed/finalize_model_grads.py:_update_router_expert_bias`). Here layers are grouped by count, so
that a uniform model still costs one all-reduce.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.utils import get_attr_wrapped_model

from megatron_moe.runtime.replace import Replacement


def remember_expert_biases(model: list[Any]) -> Callable[[], None]:
    """A function that puts every router's bias back to what it is now.

    Upstream moves the biases while it finishes the gradients, before it is known whether the step is skipped.
    """
    routers = [
        (module, module.expert_bias.clone())
        for chunk in model
        for module in get_attr_wrapped_model(chunk, "modules")()
        if getattr(module, "expert_bias", None) is not None
    ]

    def restore() -> None:
        for router, bias in routers:
            router.expert_bias.copy_(bias)

    return restore


def update_expert_bias(model: list[torch.nn.Module], config: Any, tp_dp_cp_group: Any = None) -> None:
    """Move every router's bias against its load over the whole step.

    Args:
        model: chunks of this rank; their routers hold `expert_bias` [E] and `local_tokens_per_expert` [E].
        config: holds `moe_router_bias_update_rate`.
        tp_dp_cp_group: ranks over which the loads are summed.
    """
    routers_by_count: dict[int, list[Any]] = defaultdict(list)
    for chunk in model:
        for module in get_attr_wrapped_model(chunk, "modules")():
            bias = getattr(module, "expert_bias", None)
            if bias is not None and module.training and not getattr(module, "frozen_expert_bias", False):
                routers_by_count[bias.numel()].append(module)
    # Every rank of a stage holds the same layers, so all take the counts in the same order.
    for _, routers in sorted(routers_by_count.items()):
        updated = get_updated_expert_bias(
            torch.stack([router.local_tokens_per_expert for router in routers]),
            torch.stack([router.expert_bias for router in routers]),
            config.moe_router_bias_update_rate,
            tp_dp_cp_group=tp_dp_cp_group,
        )
        for router, bias in zip(routers, updated, strict=True):
            router.expert_bias.copy_(bias)


REPLACEMENT = Replacement(
    "megatron.core.distributed.finalize_model_grads",
    "_update_router_expert_bias",
    update_expert_bias,
    "it stacks the biases of layers with different expert counts",
)
