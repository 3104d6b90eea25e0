"""Random-number states: one seed for every generator of a process, and their capture for checkpoints."""

import random
from typing import Any

import numpy as np
import torch


def set_seeds(seed: int) -> None:
    """Seed Python, numpy, torch and megatron-core's tracker.

    Pipeline stages draw different dropout masks, data-parallel replicas the same one (as Megatron-LM). Weights do not
    depend on these generators at all: see `megatron_moe.model.init`.
    """
    from megatron.core import parallel_state, tensor_parallel

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(stage_seed)
    np.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(stage_seed)


def capture_states() -> dict[str, Any]:
    """Every generator's state, as a checkpoint keeps it: numbers, text and tensors, which load without running code."""
    from megatron.core import tensor_parallel

    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def restore_states(states: dict[str, Any]) -> None:
    """Put back what `capture_states` returned."""
    from megatron.core import tensor_parallel

    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])
