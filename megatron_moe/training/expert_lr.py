"""Optimizer settings of the routed experts: a learning rate and an Adam epsilon of their own.

Learning rate: Hunyuan-Large (arXiv 2411.02265) takes Adam's best rate at batch size B from arXiv 2405.14578,

    eps_opt(B) = 2 eps_max / (sqrt(B_noise / B) + sqrt(B / B_noise)),

and gives an expert, which sees B / n tokens of a batch of B where n = experts / top-k, the rate eps_opt(B / n). With
r = B / B_noise the factor on everything else's rate is eps_opt(B / n) / eps_opt(B): 0.31 at n = 16 and r = 0.26, as
published. Here n is that of each layer.

Epsilon: PanGu-Sigma (arXiv 2303.10845) uses 1e-20 for experts and 1e-8 for the rest: the gradients of experts that see
few tokens are small. For an expert that has seen none, Adam's step is 0 / (sqrt(0) + 1e-20) = 0.

Only routed experts have them: routers, shared experts, residual MLPs and the expert residual network see every token.
"""

import math
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe.config.optimizer import OptimizerConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.layout import expert_layout

# The factor of a parameter group. megatron-core sets it to 1 and tells groups apart by it and by `optimizer`, but not
# by `eps` (`optimizer/optimizer.py:param_group_identifier_keys`): groups that it takes for one are mixed up on loading.
FACTOR, KIND = "lr_mult", "optimizer"


def best_rate(ratio: float) -> float:
    """eps_opt(B) / eps_max at B / B_noise = `ratio`."""
    return 2.0 / (math.sqrt(1.0 / ratio) + math.sqrt(ratio))


def batch_factor(share: float, ratio: float) -> float:
    """eps_opt(B / share) / eps_opt(B).

    Args:
        share: n, how many times fewer tokens than the whole batch an expert sees.
        ratio: B / B_noise.
    """
    return best_rate(ratio / share) / best_rate(ratio)


def expert_factor(flags: OptimizerConfig, experts: int, topk: int) -> float:
    """Factor on the learning rate of the experts in a layer that has `experts` of them."""
    scale = flags.expert_lr
    return batch_factor(experts / topk, flags.noise_ratio) if scale == "auto" else scale


def expert_factors(run: RunConfig) -> tuple[float, ...]:
    """The factor of every MoE layer, in order."""
    counts = expert_layout(run).counts
    return tuple(expert_factor(run.optimizer, count, run.moe.moe_router_topk) for count in counts)


def expert_groups(run: RunConfig, model: list[Any]) -> dict[ParamKey, Any]:
    """Overrides that put routed experts into parameter groups of their own (`get_megatron_optimizer`).

    Args:
        run: flags.
        model: this rank's chunks; it may hold some of the layers only.
    """
    flags = run.optimizer
    if flags.expert_lr == 1.0 and flags.expert_adam_eps is None:
        return {}
    members: dict[float, set[int]] = {}
    for chunk in model:
        for layer in moe_layers(chunk):
            factor = expert_factor(flags, layer.config.num_moe_experts, run.moe.moe_router_topk)
            members.setdefault(factor, set()).update(map(id, layer.experts.parameters()))
    overrides = {}
    for factor, parameters in members.items():
        settings: dict[str, Any] = {KIND: flags.optimizer}
        if factor != 1.0:
            settings[FACTOR] = factor
        if flags.expert_adam_eps is not None:
            settings["eps"] = flags.expert_adam_eps
        overrides[ParamKey(with_name_predicate=_among(parameters, f"experts at {factor}"))] = settings
    return overrides


def _among(parameters: set[int], name: str) -> ParamWithNamePredicate:
    return ParamWithNamePredicate(name, lambda parameter, _name: id(parameter) in parameters)


class FactoredScheduler(OptimizerParamScheduler):
    """megatron-core's scheduler, whose rates are multiplied by each group's factor, from the warm-up's start on.

    Extends `optimizer_param_scheduler.py:OptimizerParamScheduler`, where a group may have its own largest and least
    rate but starts its warm-up from the same rate as all others.
    """

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Rate of a group at the present step."""
        return float(param_group.get(FACTOR, 1.0) * super().get_lr({}))


def learning_rates(run: RunConfig, optimizer: Any) -> dict[str, float]:
    """Rates for metrics.jsonl: `lr`, and the experts' where it is another; the same on every rank.

    `expert_lr` is the largest of any layer; where layers have several, `expert_lr_min` is the least.
    """
    dense = next(group["lr"] for group in optimizer.param_groups if group.get(FACTOR, 1.0) == 1.0)
    rates = {"lr": float(dense)}
    factors = expert_factors(run)
    if any(factor != 1.0 for factor in factors):
        rates["expert_lr"] = rates["lr"] * max(factors)
        if min(factors) < max(factors):
            rates["expert_lr_min"] = rates["lr"] * min(factors)
    return rates
