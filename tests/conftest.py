"""Applies to every test: tests marked `gpu` skip, with the reason, where there is no GPU."""

from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bpe.model` and the token files `train` and `valid`, of made-up Chinese text."""
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))
