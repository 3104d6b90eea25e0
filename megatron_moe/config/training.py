"""What a training run does: batches, duration, precision, recompute and evaluation."""

from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.base import ConfigError, require, require_positive

RECOMPUTE_MODULES = ("core_attn", "mlp", "moe", "layernorm", "moe_act", "shared_experts")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training flags."""

    micro_batch_size: int = 1
    """Samples a data-parallel rank processes at once."""
    global_batch_size: int | None = None
    """Samples in an optimizer step over all ranks. Default: micro batch x data-parallel size. More than that
    is gradient accumulation."""
    rampup_batch_size: tuple[int, ...] | None = None
    """START INCREMENT SAMPLES: grow the global batch from START to --global-batch-size in steps of INCREMENT
    over SAMPLES samples."""
    train_iters: int | None = None
    """Stop after this many optimizer steps."""
    train_tokens: int | None = None
    """Stop once this many tokens were consumed."""
    exit_duration_in_mins: float | None = None
    """Save and stop after this many minutes."""
    seed: int = 1234
    """Seed of weights, dropout and data order. Weights depend on it alone, not on the parallel layout."""
    bf16: bool = False
    """Compute in bfloat16 with fp32 master weights."""
    fp16: bool = False
    """Compute in float16 with fp32 master weights and loss scaling."""
    loss_scale: float | None = None
    """Fixed loss scale for fp16. Default: dynamic."""
    initial_loss_scale: float = 4294967296.0
    """First dynamic loss scale."""
    min_loss_scale: float = 1.0
    """Smallest dynamic loss scale."""
    loss_scale_window: int = 1000
    """Steps without overflow after which the loss scale doubles."""
    hysteresis: int = 2
    """Overflows after which the loss scale halves."""
    max_nonfinite_steps: int = 3
    """Stop after this many steps in a row whose loss or gradient norm is NaN or inf. Each such step is skipped and
    counted: weights and optimizer stay as they were, its samples are consumed."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute whole layers, or chosen modules, in the backward pass instead of keeping their
    activations."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full recompute: groups of --recompute-num-layers layers, or only the first that many of a
    stage."""
    recompute_num_layers: int | None = None
    """Layers per group (uniform) or per stage (block)."""
    recompute_modules: tuple[str, ...] | None = None
    """With selective recompute: any of core_attn, mlp, moe, layernorm, moe_act, shared_experts. Default:
    core_attn."""
    recompute_activations: bool = False
    """Short for --recompute-granularity selective."""
    eval_interval: int = 100
    """Evaluate on held-out data every this many steps (0: never)."""
    eval_iters: int = 10
    """Batches in an evaluation."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "micro_batch_size",
            "global_batch_size",
            "train_iters",
            "train_tokens",
            "loss_scale_window",
            "hysteresis",
            "max_nonfinite_steps",
            "recompute_num_layers",
            "eval_iters",
        )
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        for name in ("loss_scale", "initial_loss_scale", "min_loss_scale"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "greater than 0")
        require(self.eval_interval >= 0, "eval_interval", self.eval_interval, "at least 0")
        limit = self.exit_duration_in_mins
        require(limit is None or limit > 0, "exit_duration_in_mins", limit, "greater than 0")
        if self.bf16 and self.fp16:
            raise ConfigError("--bf16 and --fp16: give one of them")
        if self.loss_scale is not None and not self.fp16:
            raise ConfigError(f"--loss-scale {self.loss_scale}: needs --fp16")
        if self.rampup_batch_size is not None:
            require(
                len(self.rampup_batch_size) == 3 and min(self.rampup_batch_size) >= 0,
                "rampup_batch_size",
                self.rampup_batch_size,
                "three numbers: START INCREMENT SAMPLES",
            )
            if self.global_batch_size is None:
                raise ConfigError("--rampup-batch-size: needs --global-batch-size")
        self._check_recompute()

    def _check_recompute(self) -> None:
        if self.recompute_activations and self.recompute_granularity == "full":
            raise ConfigError("--recompute-activations: is short for --recompute-granularity selective, not full")
        granularity = self.granularity
        if granularity == "full" and self.recompute_method is None:
            raise ConfigError("--recompute-granularity full: needs --recompute-method uniform or block")
        if granularity != "full" and self.recompute_method is not None:
            raise ConfigError(f"--recompute-method {self.recompute_method}: needs --recompute-granularity full")
        if granularity != "full" and self.recompute_num_layers is not None:
            raise ConfigError(f"--recompute-num-layers {self.recompute_num_layers}: needs --recompute-granularity full")
        if granularity != "selective" and self.recompute_modules is not None:
            raise ConfigError("--recompute-modules: needs --recompute-granularity selective")
        for module in self.recompute_modules or ():
            require(module in RECOMPUTE_MODULES, "recompute_modules", module, f"of {', '.join(RECOMPUTE_MODULES)}")

    @property
    def granularity(self) -> Literal["full", "selective"] | None:
        """Recompute granularity with --recompute-activations folded in."""
        return "selective" if self.recompute_activations else self.recompute_granularity

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """The compute precision by name."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    def micro_batches(self, data_parallel_size: int) -> int:
        """Micro-batches per step at the full global batch size.

        Raises:
            ConfigError: the global batch is not a multiple of micro batch x data-parallel size.
        """
        per_pass = self.micro_batch_size * data_parallel_size
        size = self.batch_size(data_parallel_size)
        if size % per_pass:
            raise ConfigError(
                f"--global-batch-size {size}: must be a multiple of --micro-batch-size "
                f"{self.micro_batch_size} x data-parallel size {data_parallel_size} = {per_pass}"
            )
        return size // per_pass

    def batch_size(self, data_parallel_size: int) -> int:
        """Global batch size after the default is applied."""
        return self.global_batch_size or self.micro_batch_size * data_parallel_size
