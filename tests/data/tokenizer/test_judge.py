"""The report's numbers, counted again by hand, and its page."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.build import build_tokenizer
from megatron_moe.data.tokenizer.judge import OTHER, judge_all, used_pieces
from megatron_moe.data.tokenizer.load import NullTokenizer, SentencePieceTokenizer
from megatron_moe.data.tokenizer.options import BuildOptions
from megatron_moe.data.tokenizer.report_page import report_page
from megatron_moe.data.tokenizer.sample import SampleOptions
from tests.data.chinese_text import documents, write_jsonl


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(tokenizer_model)


def test_ratios_by_kind_of_text(tokenizer: SentencePieceTokenizer) -> None:
    texts = [("新闻", "今天，北京的老师读着旧书。"), ("稀", "㐂𠮷"), ("新闻", "完\n"), ("空", "")]
    found = judge_all(tokenizer, texts)
    assert (found["documents"], found["characters"], found["bytes"]) == (4, 17, 50)
    assert list(found["groups"]) == ["新闻", "稀", "空"]
    (one,) = found["tokenizers"]
    news = sum(len(tokenizer.encode(text)) for group, text in texts if group == "新闻")
    # Neither of the two rare characters has a piece: 3 and 4 bytes.
    assert len(tokenizer.encode("㐂𠮷")) == 7
    assert one["tokens"] == news + 7
    assert one["characters_per_token"] == 17 / (news + 7)
    assert one["bytes_per_token"] == 50 / (news + 7)
    assert one["tokens_per_character"] == (news + 7) / 17
    pieces = [tokenizer.pieces[index] for _, text in texts for index in tokenizer.encode(text)]
    byte_tokens = sum(piece.startswith("<0x") for piece in pieces)
    assert byte_tokens >= 7
    assert one["byte_token_share"] == byte_tokens / (news + 7)
    assert one["by_group"]["稀"] == {
        "tokens": 7,
        "characters_per_token": 2 / 7,
        "bytes_per_token": 1.0,
        "tokens_per_character": 3.5,
    }
    assert one["by_group"]["空"]["characters_per_token"] is None
    assert one["changed_documents"] == 0


def test_many_kinds_become_one_line(tokenizer: SentencePieceTokenizer) -> None:
    texts = [(f"kind {number:02}", "老师" * (40 - number)) for number in range(30)]
    groups = judge_all(tokenizer, texts)["groups"]
    assert len(groups) == 21
    assert next(iter(groups)) == "kind 00"
    assert list(groups)[-1] == OTHER
    assert groups[OTHER]["documents"] == 10


def test_a_tokenizer_that_loses_text_is_found_out(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(60)), model_prefix=str(tmp_path / "m"), vocab_size=300, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    tokenizer = SentencePieceTokenizer(tmp_path / "m.model")
    (one,) = judge_all(tokenizer, [("", "一  二"), ("", "老师"), ("", "㐂")])["tokenizers"]
    assert one["changed_documents"] == 2
    assert one["byte_token_share"] is None


def test_no_text_is_no_number(tokenizer: SentencePieceTokenizer) -> None:
    found = judge_all(tokenizer, [])
    assert found["documents"] == 0
    assert found["tokenizers"][0]["characters_per_token"] is None


def test_dead_and_frequent_pieces() -> None:
    tokenizer = NullTokenizer(12)
    found = used_pieces(tokenizer, [("", "5 5 7")], ["10", "0"], learned_from=4)
    assert found["learned"] == 8
    assert found["dead"] == 5
    assert found["dead_examples"] == ["4", "6", "8", "9", "11"]
    assert found["most_frequent"][0] == {"piece": "5", "id": 5, "count": 2}
    assert [entry["piece"] for entry in found["longest"]][:3] == ["10", "11", "4"]
    assert found["measured_on_characters"] == 8


def build(folder: Path, **arguments: Any) -> dict[str, Any]:
    corpus = write_jsonl(folder / "a.jsonl", documents(200))
    options = BuildOptions(vocab_size=860, **arguments.pop("options", {}))
    return build_tokenizer([corpus], folder / "t", options, **arguments)


def test_other_tokenizers_and_text_of_its_own(tmp_path: Path, tokenizer_model: Path) -> None:
    heldout = write_jsonl(tmp_path / "h" / "held.jsonl", documents(20, seed=9))
    first = tmp_path / "first"
    first.mkdir()
    build(first)
    report = build(tmp_path, heldout=[heldout.parent], compare=[tokenizer_model, first / "t"])
    judged = report["heldout"]["tokenizers"]
    assert [one["kind"] for one in judged] == ["SentencePieceTokenizer"] * 2 + ["HuggingFaceTokenizer"]
    assert [one["name"] for one in judged][1:] == [str(tokenizer_model), str(first / "t")]
    # The folder holds the tokenizer that the same text makes: every number is the same.
    assert report["heldout"]["documents"] == 20
    assert list(report["heldout"]["groups"]) == ["held"]
    assert isinstance(judged[2]["characters_per_token"], float)
    assert judged[2]["changed_documents"] == 0
    page = (tmp_path / "t" / "report.html").read_text(encoding="utf-8")
    assert str(tokenizer_model) in page
    assert report["read"]["heldout_documents"] == 0


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.model").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"^--compare .*no\.model: not a SentencePiece model"):
        build(tmp_path, compare=[tmp_path / "no.model"])
    # Before anything dear was done.
    assert [path.name for path in (tmp_path / "t" / ".work").iterdir()] == ["lock"]


def test_the_page_says_when_nothing_was_held_out(tmp_path: Path) -> None:
    report = build(tmp_path, options={"sample": SampleOptions(heldout_every=0)})
    assert "No text was held out" in report_page(report).render()
    assert json.loads((tmp_path / "t" / "report.json").read_bytes()) == report
