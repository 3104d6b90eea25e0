"""Applies to every test: tests marked `gpu` skip, with the reason, where there is no GPU."""

from pathlib import Path

import pytest

from megatron_moe.config.data import DataConfig
from megatron_moe.data.preprocess import Preprocessing, preprocess
from megatron_moe.data.tokenizer.build import build_tokenizer
from tests.data.chinese_text import documents, write_jsonl


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
    folder = tmp_path_factory.mktemp("tiny")
    texts = {"train": documents(200), "valid": documents(40, seed=1)}
    paths = {name: write_jsonl(folder / f"{name}.jsonl", text) for name, text in texts.items()}
    build_tokenizer([paths["train"]], folder / "bpe", 860)
    job = Preprocessing(data=DataConfig(tokenizer_model=str(folder / "bpe.model")))
    for name, path in paths.items():
        preprocess([path], folder / name, job)
    return folder
