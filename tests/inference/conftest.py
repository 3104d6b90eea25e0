"""Checkpoints that the tests of inference load: written by the real trainer, with weights large enough that greedy
continuations are not one token for ever."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve

# 860 ids in an embedding of 896 rows: 36 of them only pad it.
SHAPE = {"train_iters": 2, "init_method_std": 0.4, "max_position_embeddings": 48}


def train(folder: Path, data: Path, world_size: int = 1, **flags: Any) -> Path:
    """A run's directory with one checkpoint."""
    folder.mkdir(exist_ok=True)
    run = tiny_run(**data_flags(data), **{**SHAPE, **flags}, save=str(folder))
    run_ranks(world_size, train_curve, run)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """Written by one process; learned positions, LayerNorm, GELU."""
    return train(tmp_path_factory.mktemp("run"), tiny_data)
