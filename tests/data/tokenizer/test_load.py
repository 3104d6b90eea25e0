"""Every kind of tokenizer: what goes in comes out, saved ones load again, mistakes are one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.tokenizer.load import (
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_saved_tokenizer,
    load_tokenizer,
)

TRICKY = [
    "",
    "第一段：“你好”，２０２６年。\n\n  第二段\t㐂𠮷",
    " 前后有空格 ",
    "\u2581▂▃ a\u2581 b",
    "\x00\x01\r\n\x0b\x0c\u2028\ufeff",
    "<eod></s><unk><0x41>\n<mask>",
    "e\u0301 ﬁ ＡＢ　①",
    "👨\u200d👩\u200d👧",
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: Path) -> Tokenizer:
    return SentencePieceTokenizer(tokenizer_model)


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("好人。\n \u2581a<>eod"))
def test_any_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


def check_batch(tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, lengths = tokenizer.encode_batch(texts)
    expected = [tokenizer.encode(text) for text in texts]
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int32)
    assert lengths.tolist() == list(map(len, expected))
    assert ids.tolist() == [index for row in expected for index in row]


def test_a_batch_has_the_ids_of_its_texts(tokenizer: Tokenizer) -> None:
    for texts in ([], ["好", "", "再见\n"], TRICKY, TRICKY[:3]):
        check_batch(tokenizer, texts)


def test_the_end_of_a_document_shows_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces[tokenizer.eod] == "<eod>"
    assert len(tokenizer.pieces) == tokenizer.vocab_size == 860
    assert tokenizer.decode([*tokenizer.encode("完"), tokenizer.eod]) == "完"


@pytest.mark.parametrize("wrong", [-1, 860])
def test_an_unknown_id_is_an_error(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(UserError, match=f"token id {wrong}: must be from 0 to 859"):
        tokenizer.decode([5, wrong])


def test_saved_tokenizers_load_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for number, original in enumerate((tokenizer, NullTokenizer(64))):
        folder = tmp_path / str(number)
        original.save_to(folder)
        again = load_saved_tokenizer(folder)
        assert type(again) is type(original)
        assert again.fingerprint == original.fingerprint
        assert again.eod == original.eod


def test_hugging_face_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    raw = tokenizers.ByteLevelBPETokenizer()
    raw.train_from_iterator(["今天天气很好。"] * 10, vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw._tokenizer, eos_token="<|end|>")
    fast.save_pretrained(tmp_path / "hf")
    tokenizer = load_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "hf")))
    text = "今天，天气 很好！\n<|end|> 吗"
    ids = tokenizer.encode(text)
    assert tokenizer.eod not in ids
    assert tokenizer.decode([*ids, tokenizer.eod]) == text
    assert tokenizer.pieces[tokenizer.eod] == "<|end|>"
    check_batch(tokenizer, [text, "", "天气\u2581 <|end|>"])
    check_batch(tokenizer, [])
    tokenizer.save_to(tmp_path / "saved")
    again = load_saved_tokenizer(tmp_path / "saved")
    assert again.encode(text) == ids
    assert again.fingerprint == tokenizer.fingerprint
    # The same pieces, but fewer merges: other ids.
    content = json.loads((tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][:3]
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    other = load_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "hf")))
    assert other.pieces == tokenizer.pieces
    assert other.encode(text) != ids
    assert other.fingerprint != tokenizer.fingerprint


def test_null_tokenizer() -> None:
    tokenizer = load_tokenizer(DataConfig(tokenizer_type="NullTokenizer"), vocab_size=100)
    assert (tokenizer.vocab_size, tokenizer.eod) == (100, 99)
    assert tokenizer.encode("3 17 5") == [3, 17, 5]
    check_batch(tokenizer, ["3 17 5", "", "99"])
    assert tokenizer.decode([3, 17, 99]) == "3 17"
    for text in ("100", "-1", "你"):
        with pytest.raises(UserError, match="is not an id from 0 to 99"):
            tokenizer.encode(text)


def test_mistakes_are_named(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"no model")
    cases = [
        (DataConfig(), "--tokenizer-model: needed with --tokenizer-type SentencePieceTokenizer"),
        (DataConfig(tokenizer_model=str(tmp_path / "x")), "no such file"),
        (DataConfig(tokenizer_model=str(garbage)), "not a SentencePiece model"),
        (DataConfig(tokenizer_type="NullTokenizer"), "needs --vocab-size"),
        (
            DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "x")),
            "no such folder",
        ),
        (
            DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path)),
            "holds no Hugging Face tokenizer",
        ),
    ]
    for data, message in cases:
        with pytest.raises((ConfigError, UserError), match=message) as caught:
            load_tokenizer(data)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_saved_tokenizer(tmp_path)
