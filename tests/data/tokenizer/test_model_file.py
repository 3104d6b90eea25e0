"""Reading a SentencePiece model without protobuf: the same pieces as the library's, and damage in one line."""

import contextlib
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.model_file import MODEL_TYPES, PieceType, parse_model
from tests.data.chinese_text import documents


def test_pieces_types_and_scores_are_those_of_the_library(tokenizer_model: Path) -> None:
    model = parse_model(tokenizer_model.read_bytes(), "m")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    assert len(model.pieces) == processor.get_piece_size()
    for index, piece in enumerate(model.pieces):
        assert piece.text == processor.id_to_piece(index)
        assert piece.score == processor.get_score(index)
        assert (piece.type == PieceType.CONTROL) == processor.is_control(index)
        assert (piece.type == PieceType.UNKNOWN) == processor.is_unknown(index)
        assert (piece.type == PieceType.BYTE) == processor.is_byte(index)
    assert model.pieces[32].type == PieceType.USER_DEFINED
    assert (model.model_type, model.byte_fallback, model.normalization) == ("bpe", True, "identity")
    changes = (model.has_table, model.dummy_prefix, model.removes_spaces, model.space_as_suffix)
    assert changes == (False,) * 4
    assert model.escapes_spaces


def test_the_library_s_defaults_are_seen(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(50)),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        hard_vocab_limit=False,
        treat_whitespace_as_suffix=True,
        minloglevel=2,
    )
    model = parse_model((tmp_path / "m.model").read_bytes(), "m")
    assert (model.model_type, model.byte_fallback, model.normalization) == ("unigram", False, "nmt_nfkc")
    assert model.has_table
    assert model.dummy_prefix
    assert model.removes_spaces
    assert model.space_as_suffix


@pytest.mark.parametrize("content", [b"\xff" * 20, b"\x0a\x05abc", b"\x0b", b"\x0a\x02\x0a\xff", b"\x12\x02\x18\x09"])
def test_what_is_no_model_is_named(content: bytes) -> None:
    with pytest.raises(UserError, match=r"^m: not a SentencePiece model, or damaged$"):
        parse_model(content, "m")


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_damage_raises_nothing_else(tokenizer_model: Path, data: st.DataObject) -> None:
    content = bytearray(tokenizer_model.read_bytes()[-3000:] if data.draw(st.booleans()) else b"")
    content += data.draw(st.binary(max_size=50))
    for _ in range(data.draw(st.integers(0, 3))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UserError):
        assert parse_model(bytes(content), "m").model_type in MODEL_TYPES.values()
