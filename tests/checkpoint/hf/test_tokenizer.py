"""Exported tokenizers give the same ids to transformers, or say that they cannot."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint.hf.texts import TEXTS, proof_ids
from megatron_moe.checkpoint.hf.tokenizer import export_tokenizer, import_tokenizer
from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer import symbols
from megatron_moe.data.tokenizer.build import BuildOptions, build_tokenizer
from megatron_moe.data.tokenizer.load import (
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
)
from tests.data.chinese_text import documents, write_jsonl

CONTEXT = 256


def gpt2_files(folder: Path) -> tuple[Path, Path]:
    """A small byte-level vocabulary learned from text."""
    from tokenizers import ByteLevelBPETokenizer

    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(documents(50) + list(TEXTS), vocab_size=500, special_tokens=["<|endoftext|>"])
    learned.save_model(str(folder))
    return folder / "vocab.json", folder / "merges.txt"


def folder_of(model_type: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def twin(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@pytest.fixture(scope="module")
def sentence_piece(tiny_data: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(tiny_data / "bpe.model")


@pytest.mark.parametrize("model_type", ["mixtral", "llama", "gpt2"])
def test_sentence_piece(sentence_piece: SentencePieceTokenizer, model_type: str, tmp_path: Path) -> None:
    folder = folder_of(model_type, tmp_path / "out")
    made = export_tokenizer(sentence_piece, folder, CONTEXT)
    assert made.exact
    assert made.compared > 100
    assert (made.eos, made.pad, made.end_of_turn) == (4, 3, 10)
    assert (folder / "tokenizer.model").is_file()
    read = twin(folder)
    assert read.model_max_length == CONTEXT
    assert read.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False) == "<|user|>你好<|end|>"
    back = import_tokenizer(folder, 860)
    assert isinstance(back, SentencePieceTokenizer)
    assert back.fingerprint == sentence_piece.fingerprint


def test_gpt2(tmp_path: Path) -> None:
    tokenizer = GPT2BPETokenizer(*gpt2_files(tmp_path))
    folder = folder_of("gpt2", tmp_path / "out")
    made = export_tokenizer(tokenizer, folder, CONTEXT)
    assert made.exact
    assert made.eos == tokenizer.eod
    # In ordinary use a spelled special token is one.
    assert twin(folder).encode("<|endoftext|>") == [tokenizer.eod]
    assert import_tokenizer(folder, 500).fingerprint == tokenizer.fingerprint


def test_hugging_face_keeps_ids_and_template(sentence_piece: SentencePieceTokenizer, tmp_path: Path) -> None:
    first = folder_of("mixtral", tmp_path / "first")
    export_tokenizer(sentence_piece, first, CONTEXT)
    for name in ("tokenizer.model", "megatron_moe_tokenizer.json"):
        (first / name).unlink()
    tokenizer = import_tokenizer(first, 896)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    second = folder_of("mixtral", tmp_path / "second")
    made = export_tokenizer(tokenizer, second, CONTEXT)
    assert made.exact
    assert made.end_of_turn == 10
    config = json.loads((second / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only", "split_special_tokens"} & set(config)
    assert (second / "chat_template.jinja").read_text() == symbols.CHAT_TEMPLATE


def test_given_template_goes_over_the_own(sentence_piece: SentencePieceTokenizer, tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    made = export_tokenizer(sentence_piece, folder_of("mixtral", tmp_path), CONTEXT, template)
    assert made.end_of_turn is None
    assert twin(tmp_path).apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False) == "[你好]"


def test_template_that_is_none(sentence_piece: SentencePieceTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--chat-template: line 1: .*; give a jinja template"):
        export_tokenizer(sentence_piece, tmp_path, CONTEXT, "{% for m in %}")


def test_kinds_without_twin_keep_their_own_file(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", documents(100))
    build_tokenizer([corpus], tmp_path / "u", BuildOptions(vocab_size=700, model_type="unigram"))
    unigram, null = SentencePieceTokenizer(tmp_path / "u" / "tokenizer.model"), NullTokenizer(100)
    for tokenizer, reason in ((unigram, "a unigram model has no exact counterpart"), (null, "ids without text")):
        folder = folder_of("mixtral", tmp_path / type(tokenizer).__name__)
        made = export_tokenizer(tokenizer, folder, CONTEXT)
        assert not made.exact
        assert reason in made.note
        assert made.eos == tokenizer.eod
        # Nothing that AutoTokenizer would read wrongly.
        assert not [path.name for path in folder.glob("tokenizer*") if path.is_file()]
        assert import_tokenizer(folder, tokenizer.vocab_size).fingerprint == tokenizer.fingerprint


def test_another_tokenizer_is_noticed(
    sentence_piece: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the ordering of equal scores a few ids differ; the comparison must see it."""
    from megatron_moe.data.tokenizer import export

    merges = export.merges
    monkeypatch.setattr(export, "merges", lambda pieces: merges(pieces)[::-1])
    with pytest.raises(UserError, match=r"tokenizer: transformers gives .* other ids than SentencePieceTokenizer"):
        export_tokenizer(sentence_piece, folder_of("mixtral", tmp_path), CONTEXT)


def test_import_refuses_what_does_not_fit(sentence_piece: SentencePieceTokenizer, tmp_path: Path) -> None:
    folder = folder_of("mixtral", tmp_path / "m")
    with pytest.raises(UserError, match=r"--hf .*m: holds no tokenizer .*--tokenizer PATH"):
        import_tokenizer(folder, 860)
    assert import_tokenizer(folder, 860, "NullTokenizer").vocab_size == 860
    export_tokenizer(sentence_piece, folder, CONTEXT)
    with pytest.raises(UserError, match=r"has 860 ids, but the model's embedding has 859 rows"):
        import_tokenizer(folder, 859)


def test_proof_ids(sentence_piece: SentencePieceTokenizer) -> None:
    rows = proof_ids(sentence_piece, 860, 48)
    assert [len(row) for row in rows] == [48] * 7
    assert len(set(rows[-1])) == 48
    assert sum(map(len, proof_ids(sentence_piece, 860, 4096))) > 1000
    drawn = proof_ids(NullTokenizer(50), 50, 4096)
    assert {index for row in drawn for index in row} == set(range(50))
