"""The CPU runtime: what must be replaced so that unmodified megatron-core 0.19 trains on gloo CPU ranks.

Each replacement names the upstream module and symbol and says why. `install()` applies them once, is called by the
entry points (never at import), and is left out when CUDA is used.
"""

import logging

import torch

from megatron_moe.runtime import cuda_standins as standins
from megatron_moe.runtime import gloo_collectives, replace
from megatron_moe.runtime.replace import Replacement

MODULES_WITH_HARD_CODED_DEVICE = (
    "megatron.core.utils",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.tensor_parallel.data",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.transformer.utils",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)


def replacements() -> list[Replacement]:
    """Every upstream symbol that the CPU runtime replaces."""
    rng = "the RNG tracker and the recompute read and write the GPU generator"
    streams = "the all-to-all dispatcher and the schedules create streams and events unconditionally"
    torch_cuda = [
        Replacement(
            "torch.cuda", "current_device", lambda: standins.CPU, "buffers are allocated on the current device"
        ),
        Replacement(
            "torch.cuda", "is_available", lambda: False, "--device cpu on a machine with GPUs leaves them alone"
        ),
        Replacement("torch.cuda", "device_count", lambda: 1, "the dataset builder divides threads by devices"),
        Replacement("torch.cuda", "synchronize", lambda device=None: None, "called around collectives and timers"),
        Replacement("torch.cuda", "Stream", standins.CpuStream, streams),
        Replacement("torch.cuda", "Event", standins.CpuEvent, streams),
        Replacement("torch.cuda", "stream", standins.stream_context, streams),
        Replacement("torch.cuda", "current_stream", standins.current_stream, streams),
        Replacement("torch.cuda", "get_rng_state", standins.get_cpu_rng_state, rng),
        Replacement("torch.cuda", "set_rng_state", standins.set_cpu_rng_state, rng),
        Replacement("torch.cuda", "manual_seed", standins.manual_seed, rng),
        Replacement("torch:Tensor", "cuda", standins.tensor_to_cpu, "checkpoint and optimizer move tensors back"),
        Replacement("torch:Tensor", "type", standins.tensor_type_as_cuda, "optimizers branch on the type's name"),
        Replacement("torch.nn:Module", "cuda", standins.module_to_cpu, "models are moved after they are built"),
    ]
    tracker = "megatron.core.tensor_parallel.random"
    splits = "all_to_all_single needs numbers as split sizes"
    megatron = [
        Replacement(tracker, "_get_cuda_rng_state", standins.get_cpu_rng_state, rng),
        Replacement(tracker, "_set_cuda_rng_state", standins.set_cpu_rng_state, "it only queues a lazy CUDA call"),
        Replacement(
            "megatron.core.transformer.moe.moe_utils", "maybe_move_tensor_to_cpu", standins.splits_to_numpy, splits
        ),
        Replacement(
            "megatron.core.transformer.moe.token_dispatcher",
            "maybe_move_tensor_to_cpu",
            standins.splits_to_numpy,
            splits,
        ),
    ]
    from megatron.core.tensor_parallel import mappings

    unequal = "gloo exchanges equal parts only, experts under expert tensor parallelism have unequal ones"
    megatron += [
        Replacement(mappings.__name__, name, substitute(vars(mappings).get(name)), unequal)
        for name, substitute in (
            ("_gather_along_first_dim", gloo_collectives.gather_along_first_dim),
            ("_reduce_scatter_along_first_dim", gloo_collectives.reduce_scatter_along_first_dim),
        )
    ]
    view = standins.TorchOnCpu()
    hard_coded = [
        Replacement(module, "torch", view, 'factories with a hard-coded device="cuda"')
        for module in MODULES_WITH_HARD_CODED_DEVICE
    ]
    return torch_cuda + megatron + hard_coded


class _SharedGeneratorFilter(logging.Filter):
    """Drops upstream's warning that the CPU generator moved inside a fork: here it is the same generator."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


_installed = False


def install() -> None:
    """Apply every replacement. A second call does nothing.

    Raises:
        UserError: an upstream symbol has moved; the message names it and the versions that are supported.
    """
    global _installed
    if _installed:
        return
    replace.apply(replacements())
    # megatron-core compiles small functions (`jit.py:jit_fuser`): on a CPU that costs seconds at the first step, needs
    # a C++ compiler, and gains nothing.
    torch.compiler.set_stance("force_eager")
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(_SharedGeneratorFilter())
    _installed = True


def is_installed() -> bool:
    """Whether this process runs with the CPU runtime."""
    return _installed
