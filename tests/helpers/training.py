"""What a rank of a training test runs: the real trainer, with a reporter that remembers."""

from dataclasses import dataclass, field
from typing import Any

from megatron_moe.config.run import RunConfig


@dataclass
class Curve:
    """What a run reported, step by step."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    aux_losses: list[float] = field(default_factory=list)
    z_losses: list[float] = field(default_factory=list)
    loads: list[dict[int, list[int]]] = field(default_factory=list)
    """Per step: tokens per expert of every MoE layer."""
    dropped: list[dict[int, int]] = field(default_factory=list)
    """Per step: assignments that found their expert full, of every MoE layer."""
    evaluations: list[float] = field(default_factory=list)
    skipped: int = 0


def train_curve(run: RunConfig) -> Curve:
    """Train a run to its end on this rank and return what every rank is told of it."""
    return record_curve(build_trainer(run))


def build_trainer(run: RunConfig) -> Any:
    """Start this rank and build its trainer, as the entry point does."""
    from megatron_moe.config.validate import validate
    from megatron_moe.runtime.distributed import environment_world_size, start
    from megatron_moe.training.loop import Trainer

    validate(run, environment_world_size())
    return Trainer.build(run, start(run.parallel, run.virtual_stages))


def record_curve(trainer: Any) -> Curve:
    """Train to the end and return what the trainer reported."""
    from megatron_moe.moe.load import LayerLoad
    from megatron_moe.training.reporting import Reporter

    curve = Curve()

    class Recorder(Reporter):
        def step(self, metrics: dict[str, Any], loads: list[LayerLoad]) -> None:
            curve.losses.append(metrics["lm_loss"])
            curve.grad_norms.append(metrics["grad_norm"])
            curve.aux_losses.append(metrics.get("moe_aux_loss", 0.0))
            curve.z_losses.append(metrics.get("moe_z_loss", 0.0))
            curve.dropped.append({load.layer: load.dropped for load in loads})
            curve.loads.append({load.layer: load.tokens for load in loads})
            curve.skipped += metrics["skipped"]
            super().step(metrics, loads)

        def evaluation(self, step: int, loss: float, perplexity: float) -> None:
            curve.evaluations.append(loss)
            super().evaluation(step, loss, perplexity)

    recorder = Recorder(
        trainer.run, first_step=trainer.progress.step, total_steps=trainer.steps, active=trainer.world.is_main
    )
    trainer.train(recorder)
    return curve
