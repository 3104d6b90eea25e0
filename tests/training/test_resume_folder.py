"""Where a run writes and what it goes on from: folders are not mixed, and the data keeps its order."""

from pathlib import Path

import pytest

from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve


def test_fresh_run_does_not_write_into_another_ones_folder(tiny_data: Path, tmp_path: Path) -> None:
    flags = data_flags(tiny_data) | {"save": str(tmp_path), "train_iters": 2}
    run_ranks(1, train_curve, tiny_run(**flags))
    metrics = (tmp_path / "metrics.jsonl").read_text()
    message = f"--save {tmp_path}: holds a run that has reached step 2; go on from it with --load {tmp_path}"
    for extra in ({}, {"load": str(tmp_path), "finetune": True}):
        with pytest.raises(RankFailure) as caught:
            run_ranks(1, train_curve, tiny_run(**flags, **extra))
        assert message in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_resumed_run_keeps_the_order_of_the_data(tiny_data: Path, tmp_path: Path) -> None:
    flags = data_flags(tiny_data) | {"save": str(tmp_path), "load": str(tmp_path)}
    whole = run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data), train_iters=6))[0]
    run_ranks(1, train_curve, tiny_run(**flags, train_iters=6, exit_duration_in_mins=1e-9))
    shorter = run_ranks(1, train_curve, tiny_run(**flags, train_iters=4))[0]
    assert shorter.losses == whole.losses[1:4]


def test_progress_of_another_version_is_refused() -> None:
    """A checkpoint from before the data had one order for every number of samples holds that number."""
    from megatron_moe.checkpoint.state import Progress
    from megatron_moe.config.base import UserError

    saved = {"step": 3, "consumed_samples": 24, "requested_samples": 80}
    with pytest.raises(UserError, match=r"runs/a: was written by another version .*requested_samples.*--finetune"):
        Progress.from_saved(saved, Path("runs/a"))
    del saved["requested_samples"]
    assert Progress.from_saved(saved, Path("runs/a")).consumed_samples == 24
