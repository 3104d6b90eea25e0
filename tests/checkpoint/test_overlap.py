"""A checkpoint holds the weights after its step, also when they are gathered during the next forward pass only."""

from pathlib import Path
from typing import Any

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve


def tensors_of(folder: Path) -> dict[str, Any]:
    import torch
    from megatron.core import dist_checkpointing

    from megatron_moe.checkpoint.layout import find_checkpoint
    from megatron_moe.checkpoint.load import read_progress
    from megatron_moe.config.parallel import ParallelConfig
    from megatron_moe.runtime.distributed import start

    start(ParallelConfig(device="cpu"))
    checkpoint = find_checkpoint(folder)
    read_progress(checkpoint)
    tensors = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return {
        key: tensor.float().numpy()
        for key, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and not key.startswith("optimizer.")
    }


def test_overlapped_gather_saves_the_same_weights(tiny_data: Path, tmp_path: Path) -> None:
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    saved = []
    for name, switches in (("plain", {}), ("overlapped", overlap)):
        flags = data_flags(tiny_data) | {"use_distributed_optimizer": True, "bf16": True, "save": str(tmp_path / name)}
        run_ranks(2, train_curve, tiny_run(**flags, **switches))
        saved.append(run_ranks(1, tensors_of, tmp_path / name)[0])
    plain, overlapped = saved
    assert plain.keys() == overlapped.keys()
    assert len(plain) > 20
    for key, tensor in plain.items():
        assert (tensor == overlapped[key]).all(), key
