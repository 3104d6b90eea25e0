"""Tokenizing files: what is written is what the tokenizer says, for any number of processes."""

from pathlib import Path

import pytest

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.indexed import bin_path, idx_path, open_indexed
from megatron_moe.data.preprocess import Preprocessing, lines, preprocess, tasks
from megatron_moe.data.tokenizer.load import SentencePieceTokenizer
from tests.data.chinese_text import documents, write_jsonl


@pytest.fixture
def job(tokenizer_model: Path) -> Preprocessing:
    return Preprocessing(data=DataConfig(tokenizer_model=str(tokenizer_model)))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_SMALL_PIECE", 2000)
    monkeypatch.setattr(lines, "_BLOCK", 700)


@pytest.mark.usefixtures("small_chunks")
def test_ids_are_the_tokenizer_s_with_an_end_after_every_document(
    tmp_path: Path, job: Preprocessing, tokenizer_model: Path
) -> None:
    texts = documents(60)
    inputs = [
        write_jsonl(tmp_path / "a.jsonl", texts[:33]),
        write_jsonl(tmp_path / "b.jsonl", [*texts[33:], ""]),
    ]
    report = preprocess(inputs, tmp_path / "pair", job)
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    pair = open_indexed(tmp_path / "pair")
    expected = [[*tokenizer.encode(text), tokenizer.eod] for text in texts]
    assert [pair.document(index).tolist() for index in range(60)] == expected
    assert (report.totals["text"].documents, report.totals["text"].empty) == (60, 1)
    assert report.totals["text"].tokens == pair.num_tokens == sum(map(len, expected))
    assert report.totals["text"].chars_per_token == pytest.approx(sum(map(len, texts)) / pair.num_tokens)


@pytest.mark.usefixtures("small_chunks")
def test_any_number_of_processes_writes_the_same_files(tmp_path: Path, job: Preprocessing) -> None:
    inputs = [
        write_jsonl(tmp_path / "a.jsonl", documents(200)),
        write_jsonl(tmp_path / "b.jsonl", documents(9, 1)),
    ]
    for workers in (1, 2, 3):
        preprocess(inputs, tmp_path / str(workers), job, workers=workers)
    for path in (bin_path, idx_path):
        first, *others = (path(tmp_path / name).read_bytes() for name in "123")
        assert all(other == first for other in others)


def test_without_end_of_document(tmp_path: Path, tokenizer_model: Path) -> None:
    job = Preprocessing(data=DataConfig(tokenizer_model=str(tokenizer_model)), append_eod=False)
    preprocess([write_jsonl(tmp_path / "a.jsonl", ["好", "再见"])], tmp_path / "pair", job)
    eod = SentencePieceTokenizer(tokenizer_model).eod
    assert eod not in open_indexed(tmp_path / "pair").tokens


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_chunks")
def test_a_bad_line_stops_everything_and_writes_no_pair(tmp_path: Path, job: Preprocessing, workers: int) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents(100))
    lines = source.read_text(encoding="utf-8").splitlines()
    lines[70] = '{"text": 1}'
    source.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl line 71: field 'text' must be a string"):
        preprocess([source], tmp_path / "pair", job, workers=workers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "pair.parts"]


def test_ids_of_a_bad_null_document_are_named(tmp_path: Path) -> None:
    job = Preprocessing(data=DataConfig(tokenizer_type="NullTokenizer"), vocab_size=10)
    source = write_jsonl(tmp_path / "a.jsonl", ["1 2", "1 10"])
    with pytest.raises(UserError, match=r"a\.jsonl line 2: NullTokenizer: '10' is not an id from 0 to 9"):
        preprocess([source], tmp_path / "pair", job)


def test_nothing_to_write_and_no_workers_are_errors(tmp_path: Path, job: Preprocessing) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match="every document is empty"):
        preprocess([source], tmp_path / "pair", job)
    with pytest.raises(ConfigError, match="--workers 0: must be at least 1"):
        preprocess([source], tmp_path / "pair", job, workers=0)
