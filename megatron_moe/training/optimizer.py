"""Optimizer, learning-rate schedule and data-parallel wrapping: megatron-core's, built from a run's flags."""

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from megatron_moe.config.run import RunConfig
from megatron_moe.model.transformer_config import DTYPES
from megatron_moe.training.batches import BatchSchedule
from megatron_moe.training.expert_copies import gradient_finalizer
from megatron_moe.training.expert_groups import FactoredScheduler, expert_groups


def wrap_data_parallel(run: RunConfig, chunks: list[Any]) -> list[DistributedDataParallel]:
    """Wrap every chunk for gradient reduction, in fp32, over the data-parallel ranks."""
    parallel = run.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    return [
        DistributedDataParallel(get_model_config(chunk), ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]


def build_optimizer(run: RunConfig, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """The optimizer, connected to the model's schedule hooks. Norms and biases are not decayed (upstream default)."""
    optimizer = stock_optimizer(run, model)
    _use_fused_adam(optimizer)
    _clip_in_the_update(optimizer)
    _let_sgd_be_loaded(optimizer)
    _share_loss_scale(optimizer)
    _refuse_nonfinite_gradients(optimizer)
    return optimizer


def stock_optimizer(run: RunConfig, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """megatron-core's optimizer as it comes, connected to the model's schedule hooks."""
    flags, training = run.optimizer, run.training
    options = MegatronOptimizerConfig(
        optimizer=flags.optimizer,
        lr=flags.lr,
        min_lr=flags.min_lr,
        weight_decay=flags.weight_decay,
        adam_beta1=flags.adam_beta1,
        adam_beta2=flags.adam_beta2,
        adam_eps=flags.adam_eps,
        sgd_momentum=flags.sgd_momentum,
        clip_grad=flags.clip_grad,
        bf16=training.bf16,
        fp16=training.fp16,
        params_dtype=DTYPES[training.precision],
        loss_scale=training.loss_scale,
        initial_loss_scale=training.initial_loss_scale,
        min_loss_scale=training.min_loss_scale,
        loss_scale_window=training.loss_scale_window,
        hysteresis=training.hysteresis,
        use_distributed_optimizer=run.parallel.use_distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(
        options,
        model,
        config_overrides=get_standard_config_overrides(options) | expert_groups(run, model),
        use_gloo_process_groups=False,
    )
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = gradient_finalizer(model, optimizer)
    if run.parallel.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in model] if len(model) > 1 else model[0].no_sync
        if run.parallel.overlap_param_gather:
            starts = [chunk.start_param_sync for chunk in model]
            config.param_sync_func = starts if len(model) > 1 else starts[0]
    return optimizer


def adam_groups(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """Parameter groups of every torch.optim.AdamW inside megatron-core's optimizer."""
    inner = [getattr(part, "optimizer", None) for part in getattr(optimizer, "chained_optimizers", [optimizer])]
    return [group for base in inner if isinstance(base, torch.optim.AdamW) for group in base.param_groups]


def _use_fused_adam(optimizer: MegatronOptimizer) -> None:
    """Take torch's fused AdamW kernel: the same update in one pass.

    megatron-core builds torch.optim.AdamW without it when neither Apex nor Transformer Engine is installed
    (`optimizer/__init__.py:_get_megatron_optimizer_based_on_param_groups`) and offers no switch.
    """
    for group in adam_groups(optimizer):
        group["fused"], group["foreach"] = True, False


def _clip_in_the_update(optimizer: MegatronOptimizer) -> None:
    """Let the fused AdamW kernel clip the gradients while it reads them, instead of in a pass over all before it.

    megatron-core multiplies every gradient by the limit over the norm (`optimizer/clip_grads.py:
    clip_grad_by_total_norm_fp32`); torch's kernel divides by `grad_scale`, an attribute meant for
    `torch.amp.GradScaler`, and leaves the quotient in the gradient just the same: equal to the last bit or two.
    """
    parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    limits = {part.config.clip_grad for part in parts}
    fused = all(
        isinstance(part.optimizer, torch.optim.AdamW) and all(group.get("fused") for group in part.param_groups)
        for part in parts
    )
    if not fused or len(limits) != 1 or not max(limits) > 0.0:
        return
    limit = limits.pop()
    for part in parts:
        part.config.clip_grad = 0.0

    def prepare(norm: float) -> bool:
        excess = (norm + 1.0e-6) / limit
        scale = torch.tensor(excess, device=torch.cuda.current_device()) if excess > 1.0 else None
        for part in parts:
            part.optimizer.grad_scale = scale
        return True

    _before_the_update(optimizer, prepare)


def _let_sgd_be_loaded(optimizer: MegatronOptimizer) -> None:
    """Give SGD the function that makes its state before a checkpoint is loaded into it.

    megatron-core has one for Adam only and calls None (`optimizer/optimizer.py:FP32Optimizer.sharded_state_dict`). A
    momentum of zeros is what SGD starts from.
    """

    def fill(sgd: torch.optim.SGD, config: Any = None) -> None:
        for group in sgd.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                sgd.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(getattr(inner, "optimizer", None), torch.optim.SGD):
            inner.init_state_fn = fill


def _share_loss_scale(optimizer: MegatronOptimizer) -> None:
    """Keep the loss scales of experts and of the rest equal (fp16).

    megatron-core gives either optimizer a scaler of its own, which sees its own overflows only
    (`optimizer/optimizer.py:ChainedOptimizer.prepare_grads`), while the loss is scaled by the first one's alone: after
    an overflow in just one of them, the gradients of the experts would be divided by another scale than the loss's.
    """
    parts = getattr(optimizer, "chained_optimizers", [])
    scalers = [part.grad_scaler for part in parts if getattr(part, "grad_scaler", None) is not None]
    if len(scalers) < 2:
        return
    prepare = optimizer.prepare_grads

    def prepare_grads() -> bool:
        before = [scaler.state_dict() for scaler in scalers]
        overflow = prepare()
        for scaler, state in zip(scalers, before, strict=True):
            if state:
                scaler.load_state_dict(state)
            scaler.update(overflow)
        return overflow

    optimizer.prepare_grads = prepare_grads


def _refuse_nonfinite_gradients(optimizer: MegatronOptimizer) -> None:
    """Leave the weights as they are when the gradient norm is NaN or inf; `step` then returns False and the norm.

    Without a loss scaler megatron-core would clip by that norm and update (`optimizer/optimizer.py:
    ChainedOptimizer.step`; its `grad_norm_skip_threshold` is never less than NaN): one bad batch would take all
    weights with it. The norm is the same on every rank, so all leave the update out together.
    """
    _before_the_update(optimizer, math.isfinite)


def _before_the_update(optimizer: MegatronOptimizer, prepare: Callable[[float], bool]) -> None:
    """Call `prepare` with the gradient norm before each update, which is left out where it returns False."""
    norm_of, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    norm = 0.0

    def get_grad_norm() -> float:
        nonlocal norm
        norm = float(norm_of() or 0.0)
        return norm

    def step_with_ready_grads() -> bool:
        return bool(prepare(norm) and update())

    optimizer.get_grad_norm, optimizer.step_with_ready_grads = get_grad_norm, step_with_ready_grads


def build_scheduler(
    run: RunConfig, optimizer: MegatronOptimizer, schedule: BatchSchedule, steps: int
) -> OptimizerParamScheduler:
    """Learning rate over samples: flags count steps, the batch schedule says which sample a step ends with.

    Args:
        run: flags.
        optimizer: whose groups are scheduled.
        schedule: batch sizes.
        steps: of the whole run; the decay's default length.
    """
    flags = run.optimizer
    decay_iters = flags.lr_decay_iters or steps
    decay_steps = schedule.samples_after(decay_iters)
    if flags.lr_warmup_fraction is not None:
        warmup_steps = int(flags.lr_warmup_fraction * decay_steps)
    else:
        warmup_steps = schedule.samples_after(flags.lr_warmup_iters)
    wsd_steps = None
    if flags.lr_wsd_decay_iters is not None:
        wsd_steps = decay_steps - schedule.samples_after(decay_iters - flags.lr_wsd_decay_iters)
    return FactoredScheduler(
        optimizer,
        init_lr=flags.lr_warmup_init,
        max_lr=flags.lr,
        min_lr=flags.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=flags.lr_decay_style,
        start_wd=flags.weight_decay,
        end_wd=flags.weight_decay,
        wd_incr_steps=decay_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=wsd_steps,
        lr_wsd_decay_style=flags.lr_wsd_decay_style,
    )
