"""Lets megatron-core 0.19 read the metadata of checkpoints that torch 2.15 or newer wrote.

torch's `TensorProperties` has gained a field `strides`, which
`megatron/core/dist_checkpointing/strategies/torch.py:TorchDistLoadShardedStrategy.load_tensors_metadata` hands to
`torch.empty`; that knows no such argument. Nothing reads it, so it is taken out before upstream sees it.
"""

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from megatron_moe.runtime.replace import Replacement

_load_tensors_metadata = TorchDistLoadShardedStrategy.load_tensors_metadata


def load_tensors_metadata(strategy: Any, checkpoint_dir: Path, metadata: Any = None) -> Any:
    """Upstream's method, on metadata without strides."""
    if metadata is None:
        metadata = FileSystemReader(checkpoint_dir).read_metadata()
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            vars(entry.properties).pop("strides", None)
    return _load_tensors_metadata(strategy, checkpoint_dir, metadata)


REPLACEMENT = Replacement(
    "megatron.core.dist_checkpointing.strategies.torch:TorchDistLoadShardedStrategy",
    "load_tensors_metadata",
    load_tensors_metadata,
    "torch's TensorProperties has a field that torch.empty does not take",
)
