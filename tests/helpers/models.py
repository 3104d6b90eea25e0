"""Whole tensors of a model that is spread over ranks: every rank hands over its shards, the test puts them together."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_moe.config.run import RunConfig


class Shard(NamedTuple):
    """A rank's part of a tensor that a checkpoint holds."""

    key: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    values: np.ndarray


def start_model(run: RunConfig, *, perturbed: bool = False, inference: bool = False) -> list[Any]:
    """Start this rank and build its chunks, bare of data parallelism.

    `perturbed` moves every parameter off its initial value (biases start at 0 and norms at 1, which hides mistakes).
    """
    from megatron_moe.config.validate import validate
    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime.distributed import environment_world_size, start
    from megatron_moe.runtime.seeds import set_seeds

    validate(run, environment_world_size())
    start(run.parallel, run.virtual_stages)
    set_seeds(run.training.seed)
    model = build_model(run, inference=inference)
    if perturbed:
        perturb(model)
    return model


def perturb(model: list[Any], scale: float = 0.1, seed: int = 99) -> None:
    """Add noise to every parameter that depends on its name alone, hence not on the layout."""
    from megatron_moe.model import init

    with torch.no_grad():
        for entry in sharded_tensors(model):
            entry.data.add_(init._draw(entry, seed).to(entry.data.dtype), alpha=scale)


def sharded_tensors(model: list[Any]) -> Iterator[Any]:
    """Every floating-point shard of this rank, with `key`, `data` and its place in the whole."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.utils import unwrap_model

    from megatron_moe.model import init

    for chunk in unwrap_model(model):
        for entry in init._leaves(chunk.sharded_state_dict()):
            parts = init._leaves(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
            for part in parts:
                if isinstance(part, ShardedTensor) and part.data is not None and part.data.is_floating_point():
                    yield part


def shards(model: list[Any]) -> list[Shard]:
    """What this rank holds, to be put together by `assemble`."""
    return [
        Shard(
            entry.key,
            tuple(entry.global_shape),
            tuple(entry.global_offset),
            entry.data.detach()
            .float()
            .reshape((1,) * entry.prepend_axis_num + tuple(entry.local_shape))
            .numpy()
            .copy(),
        )
        for entry in sharded_tensors(model)
    ]


def gather_reduced_gradients(model: list[Any]) -> None:
    """Complete the gradients under a distributed optimizer, which reduces on each rank its own part only."""
    for chunk in model:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                parts = list(bucket.grad_data.chunk(ranks.size()))
                torch.distributed.all_gather(parts, parts[ranks.rank()].clone(), group=ranks)


def gradient_shards(model: list[Any]) -> list[Shard]:
    """The gradients this rank holds, reduced over the ranks. Overwrites the weights."""
    gather_reduced_gradients(model)
    with torch.no_grad():
        for chunk in model:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    return shards(model)


class CopiesDiffer(AssertionError):
    """Ranks that hold the same part of a tensor hold different values."""


def assemble(ranks: list[list[Shard]]) -> dict[str, np.ndarray]:
    """Whole tensors by checkpoint key; every element must be there, and copies on several ranks must be equal."""
    whole: dict[str, np.ndarray] = {}
    for shard in (shard for rank in ranks for shard in rank):
        target = whole.setdefault(shard.key, np.full(shard.whole, np.nan, dtype=np.float32))
        assert target.shape == shard.whole
        place = tuple(slice(start, start + size) for start, size in zip(shard.offset, shard.values.shape, strict=True))
        there = target[place]
        known = ~np.isnan(there)
        if not np.array_equal(there[known], shard.values[known]):
            raise CopiesDiffer(f"{shard.key}: copies differ between ranks")
        target[place] = shard.values
    for key, tensor in whole.items():
        assert not np.isnan(tensor).any(), f"{key}: a part is on no rank"
    return whole


class Trained(NamedTuple):
    """What a rank hands back after some steps."""

    losses: list[float]
    grad_norms: list[float]
    gradients: list[Shard]
    """Of the last step, not clipped if --clip-grad is 0."""
    loads: dict[int, list[int]]
    """Tokens per expert of every MoE layer in the last step, on all ranks together."""


def train_and_gather(run: RunConfig, change: Callable[[Any], None] | None = None) -> Trained:
    """Train a perturbed model to its end and hand over losses, norms and the last step's gradients."""
    from megatron_moe.config.validate import validate
    from megatron_moe.moe.layout import expert_layout
    from megatron_moe.moe.metrics import collect_loads
    from megatron_moe.runtime.distributed import environment_world_size, start
    from megatron_moe.training.loop import Trainer
    from megatron_moe.training.step import train_step

    validate(run, environment_world_size())
    trainer = Trainer.build(run, start(run.parallel, run.virtual_stages))
    perturb(trainer.model)
    trainer.optimizer.reload_model_params()
    if change is not None:
        change(trainer)
    batches = trainer._training_batches()
    losses, norms, loads = [], [], {}
    for step in range(trainer.steps):
        count = trainer.schedule.micro_batches(0)
        trainer.clock.begin(step)
        result = train_step(trainer.run, trainer.model, trainer.optimizer, batches, count)
        trainer.clock.finish(skipped=result.skipped)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        layout = expert_layout(trainer.run)
        if layout.num_moe_layers:
            loads = {load.layer: load.tokens for load in collect_loads(trainer.model, layout.experts_per_layer)}
    return Trained(losses, norms, gradient_shards(trainer.model), loads)


def assert_close(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], relative: float) -> None:
    """Every tensor's error is at most `relative` times the largest value of what is expected.

    A tensor a thousand times smaller than the largest is measured as if it were just that: the gradient of a bias on
    the keys, say, is zero but for rounding, because attention does not see it.
    """
    assert set(actual) == set(expected)
    floor = 1e-3 * max(np.abs(tensor).max() for tensor in expected.values())
    for key, tensor in expected.items():
        error, size = np.abs(actual[key] - tensor).max(), max(floor, np.abs(tensor).max())
        assert error <= relative * size, f"{key}: off by {error:.2e} where values go up to {size:.2e}"


def norm_of(tensors: dict[str, np.ndarray]) -> float:
    """The global norm of whole tensors, computed by hand."""
    return float(np.sqrt(sum(np.square(tensor, dtype=np.float64).sum() for tensor in tensors.values())))
