"""One optimizer step and one evaluation: megatron-core's schedules around a next-token loss.

Shape legend: B = micro batch, S = sequence on this rank (the whole one divided by the context-parallel size).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_moe.config.run import RunConfig
from megatron_moe.moe.expert_bias import remember_expert_biases
from megatron_moe.moe.inputs import pack_inputs
from megatron_moe.runtime import allocator

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports; the same on every rank."""

    loss: float
    """Mean loss per token, in nats; NaN or inf in a step that was skipped for it."""
    grad_norm: float
    """Global norm before clipping; 0 where it was not computed, because the step was skipped before."""
    skipped: bool
    """The weights are unchanged: the gradients overflowed (fp16; the loss scale falls), or something was not finite."""

    @property
    def nonfinite(self) -> str | None:
        """What was not finite, as `loss is nan`, or None."""
        for name, value in (("loss", self.loss), ("gradient norm", self.grad_norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        return None


def context_parallel_slice(batch: Batch) -> Batch:
    """This rank's part of every [B, S, ...] tensor: chunks r and 2C-1-r of 2C, so that causal work is balanced."""
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return batch
    rank = parallel_state.get_context_parallel_rank()
    parts = {name: tensor.chunk(2 * ranks, dim=1) for name, tensor in batch.items()}
    return {name: torch.cat([part[rank], part[2 * ranks - 1 - rank]], dim=1) for name, part in parts.items()}


def next_token_loss(mask_BS: Tensor, loss_BS: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed loss, number of tokens and a report, as `schedules.py:forward_step_calc_loss` wants them when
    `calculate_per_token_loss` is set."""
    mask = mask_BS.reshape(-1).float()
    total = (loss_BS.reshape(-1).float() * mask).sum()
    tokens = mask.sum()
    return total, tokens.to(torch.int), {"loss": torch.stack([total.detach(), tokens])}


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
    """Forward pass of one micro-batch through one model chunk."""
    device = torch.cuda.current_device()
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
    inputs = pack_inputs(batch["tokens"], batch.pop("samples"), domains_BS=batch.pop("domains", None))
    batch = context_parallel_slice(batch | {"inputs": inputs})
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], padding_mask=batch["inputs"])
    return output, partial(next_token_loss, batch["loss_mask"])


def mean_loss(reports: list[dict[str, Tensor]]) -> float:
    """Mean loss per token over all micro-batches and ranks; every rank gets it.

    Only the last pipeline stage has reports.
    """
    total = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    for report in reports:
        total += report["loss"].double()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    return float(total[0] / total[1].clamp(min=1))


def run_micro_batches(
    run: RunConfig, model: list[Any], batches: list[Iterator[Batch]], count: int, *, forward_only: bool
) -> list[dict[str, Tensor]]:
    """Forward (and backward) of `count` micro-batches through this rank's chunks.

    Args:
        run: flags.
        model: chunks of this rank.
        batches: one iterator per chunk, all over the same samples.
        count: micro-batches.
        forward_only: no gradients.
    """
    return get_forward_backward_func(run.parallel.pipeline_model_parallel_size, run.virtual_stages)(
        forward_step_func=forward_step,
        data_iterator=batches if len(model) > 1 else batches[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=count,
        seq_length=run.model.seq_length,
        micro_batch_size=run.training.micro_batch_size,
        forward_only=forward_only,
    )


def train_step(
    run: RunConfig, model: list[Any], optimizer: MegatronOptimizer, batches: list[Iterator[Batch]], count: int
) -> StepResult:
    """Gradients of `count` micro-batches and one update, which is left out if the loss or the norm is not finite."""
    for chunk in model:
        chunk.train()
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    # Not looked for in vain at every step: a large model has tens of thousands of modules.
    biases = model if run.moe.moe_router_enable_expert_bias else []
    restore_expert_biases = remember_expert_biases(biases)
    reports = run_micro_batches(run, model, batches, count, forward_only=False)
    loss = mean_loss(reports)
    updated, grad_norm = False, None
    if math.isfinite(loss):
        updated, grad_norm, _ = optimizer.step()
    skipped = not _agree(bool(updated))
    if skipped:
        restore_expert_biases()
    allocator.relieve()
    return StepResult(loss=loss, grad_norm=float(grad_norm or 0.0), skipped=skipped)


def _agree(updated: bool) -> bool:
    """Whether every rank updated its weights; pipeline stages may learn of an overflow separately."""
    flag = torch.tensor([float(updated)], device=torch.cuda.current_device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


@torch.no_grad()
def evaluate(run: RunConfig, model: list[Any], batches: list[Iterator[Batch]], iterations: int, count: int) -> float:
    """Mean loss per token over `iterations` batches of `count` micro-batches, without dropout."""
    for chunk in model:
        chunk.eval()
    reports: list[dict[str, Tensor]] = []
    for _ in range(iterations):
        reports += run_micro_batches(run, model, batches, count, forward_only=True)
        allocator.relieve()
    for chunk in model:
        chunk.train()
    return mean_loss(reports)
