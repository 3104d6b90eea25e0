"""Optimizer, learning-rate schedule, weight decay and clipping."""

import math
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.base import ConfigError, require, require_fraction

# Global batch over noise batch at which the rule for experts gives Hunyuan-Large's factor (arXiv 2411.02265).
PUBLISHED_NOISE_RATIO = 0.26


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer flags. Norms and biases are never decayed."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam (with decoupled weight decay) or SGD with momentum."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "cosine"
    """Shape of the decay. WSD: warm up, stay, decay over the last --lr-wsd-decay-iters."""
    lr_decay_iters: int | None = None
    """Steps over which the learning rate decays. Default: --train-iters."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    lr_warmup_fraction: float | None = None
    """Warm-up as a fraction of --lr-decay-iters instead of --lr-warmup-iters."""
    lr_warmup_init: float = 0.0
    """Learning rate at the first step of the warm-up."""
    lr_wsd_decay_iters: int | None = None
    """WSD: steps of the final decay."""
    lr_wsd_decay_style: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "exponential"
    """WSD: shape of the final decay."""
    weight_decay: float = 0.01
    """Weight decay: decoupled with Adam, added to the gradient (L2) with SGD."""
    clip_grad: float = 1.0
    """Largest global gradient norm (0: no clipping)."""
    adam_beta1: float = 0.9
    """Adam's decay of the first moment."""
    adam_beta2: float = 0.95
    """Adam's decay of the second moment."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    expert_lr_scale: str | None = None
    """Learning rate of the routed experts, as a factor on that of the rest: a number, or `auto` (Hunyuan-Large's rule
    for the smaller batch that an expert sees, for each layer by its number of experts; Adam only). Default: 1."""
    batch_noise_ratio: float | None = None
    """For `auto`: global batch over the batch of the gradient noise scale. Default: 0.26, which gives Hunyuan-Large's
    published factor of 0.31 for 16 experts and top-1."""
    expert_adam_eps: float | None = None
    """Adam's epsilon for the routed experts (PanGu-Sigma: 1e-20). Default: --adam-eps."""
    sgd_momentum: float = 0.9
    """SGD's momentum."""

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "lr_warmup_init", "weight_decay", "clip_grad", "lr_warmup_iters"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require_fraction(self, "adam_beta1", "adam_beta2", "sgd_momentum", "lr_warmup_fraction")
        require(self.adam_eps > 0, "adam_eps", self.adam_eps, "greater than 0")
        self._check_experts()
        if self.lr_warmup_init > self.lr:
            raise ConfigError(f"--lr-warmup-init {self.lr_warmup_init}: must be at most --lr {self.lr}")
        if self.min_lr > self.lr:
            raise ConfigError(f"--min-lr {self.min_lr}: must be at most --lr {self.lr}")
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise ConfigError("--lr-warmup-fraction and --lr-warmup-iters: give one of them")
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None:
            raise ConfigError("--lr-decay-style WSD: needs --lr-wsd-decay-iters")

    @property
    def expert_lr(self) -> float | Literal["auto"]:
        """--expert-lr-scale as a factor, or `auto`."""
        if self.expert_lr_scale is None:
            return 1.0
        return "auto" if self.expert_lr_scale == "auto" else float(self.expert_lr_scale)

    @property
    def noise_ratio(self) -> float:
        """--batch-noise-ratio after its default is applied."""
        return PUBLISHED_NOISE_RATIO if self.batch_noise_ratio is None else self.batch_noise_ratio

    def _check_experts(self) -> None:
        """What applies to the routed experts alone."""
        scale, ratio, eps = self.expert_lr_scale, self.batch_noise_ratio, self.expert_adam_eps
        require(scale is None or _is_factor(scale), "expert_lr_scale", scale, "auto or a number greater than 0")
        require(ratio is None or 0 < ratio < math.inf, "batch_noise_ratio", ratio, "a number greater than 0")
        require(eps is None or 0 < eps < math.inf, "expert_adam_eps", eps, "a number greater than 0")
        if ratio is not None and scale != "auto":
            raise ConfigError(f"--batch-noise-ratio {ratio}: needs --expert-lr-scale auto")
        if self.optimizer == "sgd" and scale == "auto":
            raise ConfigError("--expert-lr-scale auto: its rule is Adam's; with --optimizer sgd give a number")
        if self.optimizer == "sgd" and eps is not None:
            raise ConfigError(f"--expert-adam-eps {eps}: SGD has no epsilon; needs --optimizer adam")


def _is_factor(text: str) -> bool:
    if text == "auto":
        return True
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
