"""Applies to every test: tests marked `gpu` skip, with the reason, where there is no GPU."""

import pytest


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
