"""Real files for the cases: token files, tokenizers of other vocabularies, and a run that was trained here."""

from pathlib import Path

import pytest

from megatron_moe.config.data import DataConfig
from megatron_moe.data.preprocess import Preprocessing, preprocess
from megatron_moe.data.tokenizer.build import train_tokenizer

pytest.register_assert_rewrite("tests.bad_input.cases")

from tests.bad_input.cases import BASE, PRETRAIN, Originals, Place  # noqa: E402
from tests.data.chinese_text import documents, write_jsonl  # noqa: E402
from tests.helpers.launch import launch  # noqa: E402


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Originals:
    """Built once: nothing here is changed by a test."""
    folder = tmp_path_factory.mktemp("originals")
    data = folder / "data"
    data.mkdir()
    texts = {"train": documents(120), "valid": documents(20, seed=1), "other": documents(120, seed=7)}
    paths = {name: write_jsonl(data / f"{name}.jsonl", text) for name, text in texts.items()}
    for name, source, size in (("bpe", "train", 860), ("other", "other", 860), ("small", "train", 800)):
        train_tokenizer([paths[source]], data / f"{name}.model", size, split_by_unicode_script=True)
    job = Preprocessing(data=DataConfig(tokenizer_model=str(data / "bpe.model")))
    for name in ("train", "valid"):
        preprocess([paths[name]], data / name, job)
    made = Originals(data, folder / "run", folder / "cache")
    words = BASE.replace("{data}", str(data)).replace("{cache}", str(made.cache)).split()
    done = launch(1, PRETRAIN, *words, "--save", made.run)
    assert done.codes == [0], done.stderr
    return made


@pytest.fixture
def place(originals: Originals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A folder of the test's own, which is the working directory too."""
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, originals)
