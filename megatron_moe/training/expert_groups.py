"""Parameter groups of the routed experts: a learning rate (`expert_lr.py`) and an Adam epsilon of their own.

PanGu-Sigma (arXiv 2303.10845) uses the epsilon 1e-20 for experts and 1e-8 for the rest: the gradients of experts that
see few tokens are small. For an expert that has seen none, Adam's step is 0 / (sqrt(0) + 1e-20) = 0.

Only routed experts are in these groups: routers, shared experts, residual MLPs and the expert residual network see
every token.
"""

from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layer import moe_layers
from megatron_moe.training.expert_lr import expert_factor, expert_factors

# The factor of a parameter group. megatron-core sets it to 1 and tells groups apart by it and by `optimizer`, but not
# by `eps` (`optimizer/optimizer.py:param_group_identifier_keys`): groups that it takes for one are mixed up on loading.
FACTOR, KIND = "lr_mult", "optimizer"


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
