"""A checkpoint holds the weights after its step, also when they are gathered during the next forward pass only."""

from pathlib import Path

import torch

from tests.helpers.checkpoints import whole_tensors
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in whole_tensors(folder).items() if not key.startswith("optimizer.")}


def test_overlapped_gather_saves_the_same_weights(tiny_data: Path, tmp_path: Path) -> None:
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    saved = []
    for name, switches in (("plain", {}), ("overlapped", overlap)):
        flags = data_flags(tiny_data) | {"use_distributed_optimizer": True, "bf16": True, "save": str(tmp_path / name)}
        run_ranks(2, train_curve, tiny_run(**flags, **switches))
        saved.append(run_ranks(1, weights_of, tmp_path / name)[0])
    plain, overlapped = saved
    assert plain.keys() == overlapped.keys()
    assert len(plain) > 20
    for key, tensor in plain.items():
        assert (tensor == overlapped[key]).all(), key
