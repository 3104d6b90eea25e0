"""Training a tokenizer: same input, same file; nothing skipped; bad input in one line."""

from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.build import build_tokenizer, choose_coverage, cut_sentences
from tests.data.chinese_text import documents, write_jsonl


def test_the_same_text_gives_the_same_model(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", documents(100))
    plain = tmp_path / "a.txt"
    plain.write_text("\n".join(documents(100)), encoding="utf-8")
    for name, source in (("one", corpus), ("two", corpus), ("plain", plain)):
        build_tokenizer([source], tmp_path / name, 860)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "plain.model").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_symbols_have_their_places(tokenizer_model: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_model))
    assert [model.id_to_piece(index) for index in range(5)] == ["<unk>", "<s>", "</s>", "<pad>", "<eod>"]
    assert model.get_piece_size() == 860
    assert model.encode("\n\n") == [model.piece_to_id("\n")] * 2
    # Punctuation and space have pieces although the corpus holds neither 《 nor a space.
    assert all(len(model.encode(character)) == 1 for character in "，。《》“ aZ7")


def test_a_line_longer_than_the_trainer_takes_is_cut_not_skipped(tmp_path: Path) -> None:
    long_line = "".join(documents(300)).replace("\n", "")
    assert len(long_line.encode()) > 50_000
    report = build_tokenizer([write_jsonl(tmp_path / "a.jsonl", [long_line])], tmp_path / "long", 860)
    assert (report.documents, report.cut_lines) == (1, 1)
    assert report.sentences >= 4
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "long.model"))
    assert "工程师" in [model.id_to_piece(index) for index in range(860)]


@given(st.text(alphabet="好a。！\U0001f600", max_size=200), st.integers(8, 40))
def test_cutting_keeps_every_character_and_the_limit(line: str, limit: int) -> None:
    parts = list(cut_sentences(line, limit))
    assert "".join(parts) == line
    assert all(len(part.encode()) <= limit for part in parts)


def test_small_vocabularies_get_a_lower_coverage() -> None:
    counts = Counter({chr(0x4E00 + rank): 1 + 200_000 // (rank + 1) for rank in range(6000)})
    assert choose_coverage(counts, 50_000) == 0.9995
    assert 0.98 <= choose_coverage(counts, 8000) < choose_coverage(counts, 12_000) < 0.9995
    assert choose_coverage(counts, 1000) == 0.98


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(300, "must be at least"), (30_000, "this text fills at most")],
)
def test_a_vocabulary_that_does_not_fit_is_one_line(tmp_path: Path, vocab_size: int, message: str) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", documents(20))
    with pytest.raises(UserError, match=rf"^--vocab-size {vocab_size}: .*{message}") as caught:
        build_tokenizer([corpus], tmp_path / "t", vocab_size)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t.model").exists()


def test_text_with_more_characters_than_pieces_is_refused(tmp_path: Path) -> None:
    every_character_once = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    corpus = write_jsonl(tmp_path / "a.jsonl", [every_character_once])
    with pytest.raises(UserError, match=r"--vocab-size 1000: at least \d{4} are needed"):
        build_tokenizer([corpus], tmp_path / "t", 1000)


def test_no_text_is_an_error(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", ["", " \n "])
    with pytest.raises(UserError, match="no text in it"):
        build_tokenizer([corpus], tmp_path / "t", 1000)
