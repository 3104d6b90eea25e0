"""What is written for a batch of texts is what plain Python gives for each of them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.preprocess import encode
from megatron_moe.data.preprocess.encode import encode_texts
from megatron_moe.data.preprocess.job import Preprocessing
from megatron_moe.data.preprocess.verify import expected_document
from megatron_moe.data.tokenizer.kinds.protocol import IdBatch
from tests.data.preprocess.helpers import LetterTokenizer

JOB = Preprocessing(data=DataConfig())
TOKENIZER = LetterTokenizer()


@settings(max_examples=300)
@given(
    texts=st.lists(st.text("ab。\n ", max_size=12), max_size=8),
    append_eod=st.booleans(),
    split=st.booleans(),
    max_length=st.none() | st.integers(2, 8),
)
def test_a_batch_is_its_documents(texts: list[str], append_eod: bool, split: bool, max_length: int | None) -> None:
    job = dataclasses.replace(JOB, append_eod=append_eod, split_sentences=split, max_length=max_length)
    encoded = encode_texts(texts, TOKENIZER, job)
    documents = [expected_document(text, TOKENIZER, job) for text in texts]
    written = [sequences for sequences in documents if sequences]
    assert encoded.tokens.dtype == np.uint16
    assert encoded.tokens.tolist() == [index for sequences in written for ids in sequences for index in ids]
    assert encoded.lengths.tolist() == [len(ids) for sequences in written for ids in sequences]
    assert encoded.documents.tolist() == [len(sequences) for sequences in written]
    totals = encoded.totals
    assert (totals.documents, totals.empty) == (len(written), len(texts) - len(written))
    assert (totals.tokens, totals.sequences) == (encoded.tokens.size, encoded.lengths.size)
    whole = [text for text in texts if text.replace(" ", "")]
    over = [len(TOKENIZER.encode(text)) + append_eod - (max_length or 99) for text in whole]
    assert (totals.cut_documents, totals.cut_tokens) == (sum(n > 0 for n in over), sum(max(n, 0) for n in over))
    assert (totals.characters, totals.text_bytes) == (len("".join(whole)), len("".join(whole).encode()))


def test_many_sentences_are_given_to_the_tokenizer_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    job = dataclasses.replace(JOB, split_sentences=True)
    whole = encode_texts(["a。b。c。", " ", "ab。" * 9], TOKENIZER, job)
    monkeypatch.setattr(encode, "_TEXTS", 5)
    parts = encode_texts(["a。b。c。", " ", "ab。" * 9], TOKENIZER, job)
    assert all(
        np.array_equal(getattr(whole, name), getattr(parts, name)) for name in ("tokens", "lengths", "documents")
    )


def test_a_document_by_hand() -> None:
    job = dataclasses.replace(JOB, split_sentences=True, max_length=4)
    encoded = encode_texts(["a。b。c", " ", "ab"], TOKENIZER, job)
    a, b, stop = (ord(character) % 997 for character in "ab。")
    assert encoded.tokens.tolist() == [a, stop, b, TOKENIZER.eod, a, b, TOKENIZER.eod]
    assert encoded.lengths.tolist() == [2, 2, 3]
    assert encoded.documents.tolist() == [2, 1]
    assert (encoded.totals.cut_tokens, encoded.totals.cut_documents, encoded.totals.empty) == (2, 1, 1)
    assert encoded.totals.chars_per_token == pytest.approx(7 / 9)


def test_an_id_outside_of_the_vocabulary_is_not_wrapped() -> None:
    class Wrong(LetterTokenizer):
        def encode_batch(self, texts: object) -> IdBatch:
            return np.array([70000], np.int32), np.array([1], np.int32)

    with pytest.raises(UserError, match="the tokenizer gave id 70000, but has only 1000"):
        encode_texts(["a"], Wrong(), JOB)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"json_keys": ()}, "--json-keys: name at least one"),
        ({"json_keys": ("a", "a")}, "--json-keys a: is given twice"),
        ({"json_keys": ("a", "b/c")}, "--json-keys 'b/c': becomes part of a file's name"),
        ({"max_length": 1}, "--max-length 1: must be at least 2"),
        ({"max_length": 0, "append_eod": False}, "--max-length 0: must be at least 1"),
        ({"max_document_bytes": 0}, "--max-document-bytes 0: must be at least 1"),
    ],
)
def test_flags_that_cannot_be(flags: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(JOB, **flags)
