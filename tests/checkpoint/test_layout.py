"""Which checkpoints stay: the newest of this run, whatever an earlier one left in the folder."""

from pathlib import Path

import pytest

from megatron_moe.checkpoint.layout import (
    LATEST_FILE,
    checkpoint_folder,
    find_checkpoint,
    latest_iteration,
    prune,
    publish,
)
from megatron_moe.config.base import UserError


def run_with(folder: Path, steps: list[int], latest: int) -> Path:
    for step in steps:
        checkpoint_folder(folder, step).mkdir()
    (folder / LATEST_FILE).write_text(f"{latest}\n")
    return folder


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in folder.glob("iter_*"))


def test_newest_stay(tmp_path: Path) -> None:
    prune(run_with(tmp_path, [100, 200, 300], 300), 2)
    assert kept(tmp_path) == [200, 300]


def test_later_steps_of_an_earlier_run_go_first(tmp_path: Path) -> None:
    prune(run_with(tmp_path, [100, 110, 200, 300], 110), 2)
    assert kept(tmp_path) == [100, 110]
    assert find_checkpoint(tmp_path).name == "iter_0000110"


def test_latest_is_never_deleted(tmp_path: Path) -> None:
    prune(run_with(tmp_path, [110, 200, 300], 110), 1)
    assert kept(tmp_path) == [110]


def test_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    run_with(tmp_path, [100], 100)
    (checkpoint_folder(tmp_path, 100) / "old").touch()
    unfinished = tmp_path / "iter_0000100.unfinished"
    unfinished.mkdir()
    (unfinished / "new").touch()
    assert publish(unfinished, 100) == checkpoint_folder(tmp_path, 100)
    assert [path.name for path in checkpoint_folder(tmp_path, 100).iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000100", LATEST_FILE]


def test_latest_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    run_with(tmp_path, [100, 200], 300)
    with pytest.raises(UserError, match=r"names step 300, .* not there; .* iter_0000100, iter_0000200"):
        latest_iteration(tmp_path)
