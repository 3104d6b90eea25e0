"""The tokenizer that several data tests share: trained once a session on the made-up corpus."""

from pathlib import Path

import pytest

from megatron_moe.data.tokenizer.build import train_tokenizer
from tests.data.chinese_text import documents, write_jsonl


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of 860 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(folder / "corpus.jsonl", documents(400))
    train_tokenizer([corpus], folder / "tiny.model", 860, split_by_unicode_script=True)
    return folder / "tiny.model"
