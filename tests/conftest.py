"""Applies to every test: tests marked `gpu` skip, with the reason, where there is no GPU; one fork server for all."""

from multiprocessing import forkserver
from pathlib import Path

import pytest

from tests.helpers.distributed import CONTEXT, PRELOADED
from tests.helpers.tiny import write_tiny_data


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    # Imported only when it is asked: most test runs collect before torch is needed.
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU: run make gpu-check on a machine that has one")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def fork_server() -> None:
    """A process has one fork server, that of whoever starts it first. Begun by `data/pool.py` it would lack what ranks
    and programs of tests find imported, and third parties' warnings would be in what those print."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    forkserver.ensure_running()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bpe.model` and the token files `train` and `valid`, of made-up Chinese text."""
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))
