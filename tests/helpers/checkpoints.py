"""What lies in a checkpoint, read as a test wants it: every tensor whole, without a model."""

from pathlib import Path

import torch


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint in a run's folder, put together; for a rank of its own."""
    from megatron.core import dist_checkpointing

    from megatron_moe.checkpoint import safe_reader
    from megatron_moe.checkpoint.layout import find_checkpoint
    from megatron_moe.config.parallel import ParallelConfig
    from megatron_moe.runtime import replace
    from megatron_moe.runtime.distributed import start

    start(ParallelConfig(device="cpu"))
    replace.apply(safe_reader.REPLACEMENTS)
    return {
        key: value
        for key, value in dist_checkpointing.load_plain_tensors(str(find_checkpoint(folder))).items()
        if isinstance(value, torch.Tensor)
    }
