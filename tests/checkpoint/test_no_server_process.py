"""Saving starts no process that would outlive a killed rank."""

from pathlib import Path

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve


def children_after_saving(flags: dict[str, object]) -> list[str]:
    import psutil

    train_curve(tiny_run(**flags))
    return [child.name() for child in psutil.Process().children(recursive=True)]


def test_saving_leaves_no_child_behind(tiny_data: Path, tmp_path: Path) -> None:
    flags = data_flags(tiny_data) | {"save": str(tmp_path), "train_iters": 1}
    assert run_ranks(1, children_after_saving, flags)[0] == []
    assert (tmp_path / "iter_0000001" / "metadata.json").exists()
