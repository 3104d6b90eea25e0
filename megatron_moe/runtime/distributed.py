"""Process groups: starts torch.distributed and megatron-core's parallel groups, with or without torchrun."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_moe.config.base import ConfigError
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.runtime import allocator, cpu, cpu_matmul


@dataclass(frozen=True)
class World:
    """Where this process stands among all processes of the run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for the run."""
        return self.rank == 0


def environment_rank() -> int:
    """Rank given by torchrun, or 0 without it."""
    return int(os.environ.get("RANK", "0"))


def environment_world_size() -> int:
    """Number of processes given by torchrun, or 1 without it.

    Raises:
        ConfigError: only one of RANK and WORLD_SIZE is set, as when a launcher was half imitated.
    """
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        given, absent = ("RANK", "WORLD_SIZE") if "RANK" in os.environ else ("WORLD_SIZE", "RANK")
        raise ConfigError(
            f"{given} {os.environ[given]}: the environment lacks {absent}; set both (torchrun does) or none"
        )
    return int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(config: ParallelConfig, local_rank: int) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: CUDA was asked for and is not there, or there are fewer GPUs than local processes.
    """
    available = torch.cuda.is_available()
    if config.device == "cpu" or (config.device == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(
            "--device cuda: torch sees no GPU here; use --device cpu, or see python -m megatron_moe.doctor"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"--nproc-per-node: process {local_rank} of this node has no GPU of its own, there are {count}; "
            f"start at most {count}, or use --device cpu"
        )
    return torch.device("cuda", local_rank)


def start(config: ParallelConfig, virtual_stages: int | None = None, *, trains: bool = True) -> World:
    """Start torch.distributed and megatron-core's groups; on the CPU install the CPU runtime first.

    Without torchrun the world is this one process, which needs no rendezvous and no port number.

    Args:
        config: parallel sizes and device.
        virtual_stages: model chunks per pipeline rank (`RunConfig.virtual_stages`), for an interleaved pipeline.
        trains: whether `training/step.py` will run, which keeps the memory of a step for the next one.

    Raises:
        ConfigError: the parallel sizes do not fit the number of processes, or the device is missing.
    """
    rank, size = environment_rank(), environment_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    config.data_parallel_size(size)
    device = choose_device(config, local_rank)
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if device.type == "cpu":
        cpu.install()
        cpu_matmul.install()
        if trains:
            allocator.keep_memory()
    else:
        # Keeps communication kernels from overtaking the compute they wait for (Megatron-LM's recommendation).
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        if device.type == "cpu":
            _agree_on_products()
        _start_model_parallel(config, virtual_stages)
    else:
        start_alone(backend)
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


def _agree_on_products() -> None:
    """Let all ranks compute fp32 products the same way: rounded otherwise, a near-tie would send a token to different
    experts on two tensor-parallel ranks."""
    everywhere = torch.tensor(int(cpu_matmul.is_installed()))
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    if not everywhere:
        cpu_matmul.uninstall()


def start_alone(backend: str = "gloo") -> None:
    """A world of this one process, without a rendezvous; the CPU runtime must be installed where there is no GPU."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    _start_model_parallel(ParallelConfig(), None)


def _start_model_parallel(config: ParallelConfig, virtual_stages: int | None) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_size,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
        create_gloo_process_groups=False,
    )


def stop() -> None:
    """Leave the process groups, all ranks together. Safe to call when they were never started.

    A rank that is done waits: one that fails in its last file must take it along, so that no rank reports success; and
    a launcher ends all ranks when one leaves with a code that is not 0, while rank 0 may still close its files.
    """
    if not dist.is_initialized():
        return
    dist.barrier()
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
