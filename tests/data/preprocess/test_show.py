"""What a person sees of a pair."""

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.preprocess import Preprocessing, preprocess
from megatron_moe.data.preprocess.show import inspect
from megatron_moe.data.tokenizer.load import NullTokenizer, SentencePieceTokenizer
from tests.data.chinese_text import write_jsonl


def test_documents_are_shown_as_text(tmp_path: Path, tokenizer_model: Path) -> None:
    job = Preprocessing(data=DataConfig(tokenizer_model=str(tokenizer_model)), split_sentences=True)
    preprocess([write_jsonl(tmp_path / "a.jsonl", ["你好。再见", "长" * 30])], tmp_path / "out", job)
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    first, second = (len(tokenizer.encode(text)) for text in ("你好。", "再见"))
    lines = list(inspect(tmp_path / "out", tokenizer, [0], 2, characters=20))
    assert lines[0].startswith(f"{tmp_path / 'out'}: 2 documents, 3 sequences, ")
    assert "tokens of uint16" in lines[0]
    assert lines[1] == "documents are divided into sequences: 1.50 each"
    assert lines[2] == f"end of document (id {tokenizer.eod}): at the end of 2 of 2 documents looked at"
    shown = [
        f"\n--- document 0: {first + second + 1} tokens in sequences of {first}, {second + 1}",
        "你好。",
        "再见 <end of document>",
    ]
    assert lines[3:6] == lines[6:9] == shown
    assert lines[10] == "长" * 20 + " ... (28 more characters)"
    with pytest.raises(UserError, match=r"--document 2: .*out holds documents 0 to 1"):
        list(inspect(tmp_path / "out", tokenizer, [2], 0))


def test_what_is_odd_is_said(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer:
        writer.add(np.array([1, 9, 2, 9, 3], np.uint16), np.array([4, 1], np.int32))
    lines = list(inspect(tmp_path / "a", NullTokenizer(10), [], 0))
    assert lines[1:] == ["end of document (id 9): at the end of 1 of 2 documents looked at, and inside 1"]
    assert list(inspect(tmp_path / "a", None, [0], 0))[1:] == ["\n--- document 0: 4 tokens", "1 9 2 9"]
    with pytest.raises(UserError, match="document 0 holds token id 9, but the vocabulary has 8"):
        list(inspect(tmp_path / "a", NullTokenizer(8), [], 0))
