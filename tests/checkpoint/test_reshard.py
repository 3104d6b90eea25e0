"""A checkpoint goes through other layouts and back: weights, moments, masters and the next losses stay what they were.

Resharding only moves numbers, so whole tensors are compared bit for bit, as they lie in the files. The losses that
follow are computed under another layout each time: sums in another order, see tests/equivalence.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.config.run import RunConfig
from tests.helpers.checkpoints import whole_tensors
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import build_trainer, record_curve, train_curve

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"

SEQUENTIAL = {"moe_expert_backend": "sequential"}
# Both directions, with experts in two, four and one part; 4 and 8 experts; stacked weights and one module an expert.
CHAIN: list[tuple[str, int, dict[str, Any]]] = [
    ("tensor 2, expert 2", 4, {TENSOR: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
    ("pipeline 2, expert 2", 4, {PIPELINE: 2, EXPERT: 2} | SEQUENTIAL),
    ("expert 4", 4, {EXPERT: 4}),
    ("one process", 1, SEQUENTIAL),
    ("expert 4, distributed optimizer", 4, {EXPERT: 4, "use_distributed_optimizer": True}),
    ("pipeline 2, interleaved", 2, {PIPELINE: 2, "num_layers_per_virtual_pipeline_stage": 1} | SEQUENTIAL),
    ("tensor 2, expert tensor 2, expert 2", 4, {TENSOR: 2, EXPERT: 2, EXPERT_TENSOR: 2}),
    ("tensor 2, expert 2", 4, {TENSOR: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
]


def save_as_loaded(run: RunConfig, folder: str) -> None:
    """Load, and save at once under this layout."""
    import dataclasses

    from megatron_moe.checkpoint.save import save_checkpoint

    trainer = build_trainer(run)
    target = dataclasses.replace(trainer.run, checkpoint=dataclasses.replace(run.checkpoint, save=folder))
    save_checkpoint(target, trainer.model, trainer.optimizer, trainer.scheduler, trainer.progress, trainer.tokenizer)


def losses(run: RunConfig) -> list[float]:
    return record_curve(build_trainer(run)).losses


def test_reshard_there_and_back(tiny_data: Path, tmp_path: Path) -> None:
    flags = data_flags(tiny_data) | {"tensorboard": False, "swiglu": True}
    _, world_size, layout = CHAIN[0]
    run_ranks(world_size, train_curve, tiny_run(**flags | layout, train_iters=3, save=str(tmp_path / "0")))
    first = run_ranks(1, whole_tensors, tmp_path / "0")[0]
    kinds = {"exp_avg.", "exp_avg_sq."}
    assert all(any(f"optimizer.state.{kind}" in key and "experts" in key for key in first) for kind in kinds)
    expected = None
    for index, (name, world_size, layout) in enumerate(CHAIN[1:], start=1):
        run = tiny_run(**flags | layout, train_iters=3, load=str(tmp_path / str(index - 1)))
        run_ranks(world_size, save_as_loaded, run, str(tmp_path / str(index)))
        tensors = run_ranks(1, whole_tensors, tmp_path / str(index))[0]
        # fp32 without the distributed optimizer keeps no masters: they are the weights.
        shared = {key for key in first if not key.startswith("optimizer.state.param.")}
        assert shared == {key for key in tensors if not key.startswith("optimizer.state.param.")}, name
        for key in shared:
            assert torch.equal(tensors[key], first[key]), f"{name}: {key}"
        for key in tensors.keys() - shared:
            assert torch.equal(tensors[key], first[key.removeprefix("optimizer.state.param.")]), f"{name}: {key}"
        following = run_ranks(
            world_size, losses, tiny_run(**flags | layout, train_iters=6, load=str(tmp_path / str(index)))
        )[0]
        expected = expected or following
        assert len(following) == 3
        assert following == pytest.approx(expected, rel=2e-5), name
