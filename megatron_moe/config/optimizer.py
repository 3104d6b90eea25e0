"""Optimizer, learning-rate schedule, weight decay and clipping."""

from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.base import ConfigError, require, require_fraction


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
    """Learning rate of the routed experts, as a factor on --lr: a number, or `auto` (Hunyuan-Large's rule for the
    smaller batch that an expert sees). Default: the same as the rest."""
    batch_noise_ratio: float = 0.26
    """For `auto`: global batch over the batch of the gradient noise scale; 0.26 gives Hunyuan-Large's 0.31."""
    expert_adam_eps: float | None = None
    """Adam's epsilon for the routed experts (PanGu-Sigma: 1e-20). Default: --adam-eps."""
    sgd_momentum: float = 0.9
    """SGD's momentum."""

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "lr_warmup_init", "weight_decay", "clip_grad", "lr_warmup_iters"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require_fraction(self, "adam_beta1", "adam_beta2", "sgd_momentum", "lr_warmup_fraction")
        require(self.adam_eps > 0, "adam_eps", self.adam_eps, "greater than 0")
        if self.lr_warmup_init > self.lr:
            raise ConfigError(f"--lr-warmup-init {self.lr_warmup_init}: must be at most --lr {self.lr}")
        if self.min_lr > self.lr:
            raise ConfigError(f"--min-lr {self.min_lr}: must be at most --lr {self.lr}")
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters:
            raise ConfigError("--lr-warmup-fraction and --lr-warmup-iters: give one of them")
        if self.lr_decay_style == "WSD" and self.lr_wsd_decay_iters is None:
            raise ConfigError("--lr-decay-style WSD: needs --lr-wsd-decay-iters")
