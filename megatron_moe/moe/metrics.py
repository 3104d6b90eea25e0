"""What the experts did in a step: auxiliary losses and tokens per expert, gathered from every rank.

Shape legend: L = layers of the whole model, E = experts of a layer, M = experts of the largest layer.
"""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.load import LayerLoad


def collect_loads(model: list[torch.nn.Module], experts_per_layer: tuple[int, ...]) -> list[LayerLoad]:
    """Loads of every MoE layer since the last call; a collective, the same on every rank.

    Args:
        model: this rank's chunks.
        experts_per_layer: [L], 0 for dense layers.
    """
    width = max(experts_per_layer)
    loads = torch.zeros(len(experts_per_layer), width + 2, dtype=torch.float64, device=torch.cuda.current_device())
    for chunk in model:
        for layer in moe_layers(chunk):
            counters = layer.router.take_load()
            assert layer.layer_number is not None
            loads[layer.layer_number - 1, : counters.numel() - 2] = counters[:-2]
            loads[layer.layer_number - 1, -2:] = counters[-2:]
    dist.all_reduce(loads, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(loads, group=parallel_state.get_pipeline_model_parallel_group())
    return [
        LayerLoad(number, [int(n) for n in row[:count].tolist()], dropped=int(row[-2]), recycled=int(row[-1]))
        for number, (row, count) in enumerate(zip(loads, experts_per_layer, strict=True), 1)
        if count
    ]


def discard_metrics(model: list[torch.nn.Module]) -> None:
    """Empty the counters of this rank without exchanging them, for steps that are not reported."""
    for chunk in model:
        for layer in moe_layers(chunk):
            layer.router.take_load()
    get_moe_metrics_tracker().clear()


def collect_aux_losses(num_layers: int, num_moe_layers: int, micro_batches: int) -> dict[str, float]:
    """Auxiliary losses of a step by name, unweighted, averaged over MoE layers and micro-batches; a collective.

    Reads megatron-core's tracker (`transformer/moe/moe_logging.py`) but reduces by itself: upstream averages with
    ReduceOp.AVG, which gloo does not have, and skips ranks without MoE layers, which hangs the others.
    """
    tracker = get_moe_metrics_tracker()
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=False)
    split = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    # What the sum over all ranks must be divided by: a balancing loss is a sum of shares within a replica (or, for
    # the global one, over all of them), the z-loss and the margin loss a mean of every rank's own.
    shares = {
        "load_balancing_loss": ranks,
        "seq_load_balancing_loss": ranks,
        "global_load_balancing_loss": 1,
        "z_loss": split.size(),
        "margin_loss": split.size(),
    }
    losses = {}
    for name in shares:
        entry = tracker.metrics.get(name)
        value = torch.zeros(num_layers + 1, dtype=torch.float64, device=torch.cuda.current_device())
        if entry is not None:
            value[:-1] = entry.values.double()
            value[:-1] /= shares[name]
            value[-1] = 1.0
        dist.all_reduce(value, group=split)
        dist.all_reduce(value, group=parallel_state.get_pipeline_model_parallel_group())
        if value[-1] > 0:
            losses[name] = float(value[:-1].sum() / (num_moe_layers * micro_batches))
    tracker.clear()
    return losses
