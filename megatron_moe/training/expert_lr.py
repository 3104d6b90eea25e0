"""The rule for the learning rate of routed experts, which see fewer tokens than the rest of the model. No torch here.

Hunyuan-Large (arXiv 2411.02265) takes Adam's best rate at batch size B from arXiv 2405.14578,

    eps_opt(B) = 2 eps_max / (sqrt(B_noise / B) + sqrt(B / B_noise)),

and gives an expert, which sees B / n tokens of a batch of B where n = experts / top-k, the rate eps_opt(B / n). With
r = B / B_noise the factor on everything else's rate is eps_opt(B / n) / eps_opt(B): 0.31 at n = 16 and r = 0.26, as
published. Here n is that of each layer.
"""

import math

from megatron_moe.config.optimizer import OptimizerConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout


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


def describe_factors(run: RunConfig) -> str:
    """The factors in a line, each with the numbers of experts it is for."""
    factors = dict(zip(expert_layout(run).counts, expert_factors(run), strict=True))
    each = ", ".join(f"{factor:.3g} x for {count} experts" for count, factor in sorted(factors.items()))
    return f"learning rate of the routed experts: {each}"
