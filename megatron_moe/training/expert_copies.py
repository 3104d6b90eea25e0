"""Gradients of experts that several expert-parallel ranks hold copies of (`moe/expert_parallel.py`).

megatron-core reduces the gradients of experts over ranks that hold the same experts when all layers are spread over the
whole --expert-model-parallel-size (`distributed/distributed_data_parallel.py`: `expt_dp`). Copies inside of an
expert-parallel group have seen other tokens; their gradients are summed afterwards. Copies lie at the same place in the
buffers of their ranks, so that under ZeRO-1 each of them owns the same part, and only that part is summed.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_moe.moe.layer import moe_layers


def gradient_finalizer(model: list[Any], optimizer: MegatronOptimizer) -> Callable[..., None]:
    """What the schedules call when all micro-batches are done: megatron-core's function, then the sum over copies.

    Args:
        model: this rank's chunks, wrapped for data parallelism.
        optimizer: of all of them.
    """
    layers = [layer for chunk in model for layer in moe_layers(chunk) if layer.copies is not None]
    if not layers:
        return finalize_model_grads
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    owners = [part for part in parts if isinstance(part, DistributedOptimizer)]

    def finalize(*args: Any, **kwargs: Any) -> None:
        finalize_model_grads(*args, **kwargs)
        sums = [
            dist.all_reduce(gradient, group=layer.copies, async_op=True)
            for layer in layers
            for parameter in layer.experts.parameters()
            if (gradient := _reduced_part(parameter, owners)) is not None
        ]
        for handle in sums:
            handle.wait()

    return finalize


def _reduced_part(parameter: Any, owners: list[DistributedOptimizer]) -> Tensor | None:
    """A view of what this rank has the reduced gradient of: the whole, or, under ZeRO-1, its own part, if any.

    Reads `optimizer/distrib_optimizer.py:DistributedOptimizer.model_param_gbuf_map` and `_get_model_param_range_map`.
    """
    if not owners:
        return parameter.main_grad
    for owner in owners:
        if parameter in owner.model_param_gbuf_map:
            own = owner._get_model_param_range_map(parameter)["param"]
            return parameter.main_grad.view(-1)[own.start : own.end]
    return None
