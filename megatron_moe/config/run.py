"""A whole run: every section together, and the checks that need more than one of them."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_moe.config.base import ConfigError, require
from megatron_moe.config.data import DataConfig
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.optimizer import OptimizerConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.routing import RoutingConfig
from megatron_moe.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Where a run is written and where it starts from."""

    save: str | None = None
    """The run's directory: checkpoints, config.yaml, metrics.jsonl, expert_load.jsonl, tensorboard/."""
    load: str | None = None
    """Go on from the latest checkpoint of this run. With the same folder as --save, an empty one starts
    afresh."""
    save_interval: int | None = None
    """Save every this many steps; the last step is always saved."""
    keep_last: int | None = None
    """Keep only this many checkpoints."""
    no_load_optim: bool = False
    """Load weights without optimizer state."""
    no_load_rng: bool = False
    """Load without the random-number states."""
    finetune: bool = False
    """Load weights only, and start at step 0 with fresh data, schedule and optimizer."""

    def __post_init__(self) -> None:
        for name in ("save_interval", "keep_last"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        if self.finetune and self.load is None:
            raise ConfigError("--finetune: needs --load")
        if (self.save_interval or self.keep_last) and self.save is None:
            raise ConfigError("--save-interval and --keep-last: need --save")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What a run reports while it trains."""

    log_interval: int = 1
    """Report every this many steps, and the first and the last."""
    tensorboard: bool = True
    """Write TensorBoard events to the run's directory."""
    wandb_project: str | None = None
    """Report to this Weights & Biases project as well (pip install wandb)."""
    wandb_name: str | None = None
    """Name of the run there. Default: the name of the run's directory."""
    progress: Literal["auto", "on", "off"] = "auto"
    """A progress bar; `auto` shows it on a terminal."""

    def __post_init__(self) -> None:
        require(self.log_interval >= 1, "log_interval", self.log_interval, "at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Every section of a training run. YAML nests by section name; flags are flat."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def uses_sequence_parallel(self) -> bool:
        """Sequence parallelism as asked for, or as megatron-core requires it to train experts under tensor
        parallelism (`moe_layer.py:MoELayer.forward` refuses to run without)."""
        has_experts = self.moe.num_experts is not None
        return self.parallel.sequence_parallel or (has_experts and self.parallel.tensor_model_parallel_size > 1)

    @property
    def virtual_stages(self) -> int | None:
        """Model chunks per pipeline rank, or None without interleaving."""
        per_stage = self.parallel.num_layers_per_virtual_pipeline_stage
        if per_stage is None:
            return None
        return self.model.num_layers // (self.parallel.pipeline_model_parallel_size * per_stage)

    @property
    def shares_routing_embedding(self) -> bool:
        """Whether all layers have one routing embedding, with a copy on every pipeline stage."""
        return self.moe.router == "token-embedding" and self.routing.router_embedding_shared

    @property
    def expert_ffn_size(self) -> int:
        """Width of a routed expert after the default is applied."""
        return self.moe.moe_ffn_hidden_size or self.model.ffn_size

    @property
    def expert_backend(self) -> str:
        """`grouped`, `sequential` or `te`: --moe-expert-backend after the default is applied."""
        if self.moe.moe_expert_backend != "auto":
            return self.moe.moe_expert_backend
        return "te" if self.model.transformer_impl == "transformer_engine" else "grouped"
