"""Verification agrees with what was written, and names the first thing that is not."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.indexed import bin_path, idx_path
from megatron_moe.data.indexed_stream import PairReader
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.preprocess import Preprocessing, commands, lines, preprocess, tasks
from megatron_moe.data.preprocess.verify import verify
from tests.data.chinese_text import documents, write_jsonl
from tests.data.preprocess.helpers import write_records


@pytest.fixture
def job(tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch) -> Preprocessing:
    monkeypatch.setattr(tasks, "_SMALL_PIECE", 2000)
    return Preprocessing(data=DataConfig(tokenizer_model=str(tokenizer_model)))


@pytest.mark.parametrize(
    "flags",
    [{}, {"split_sentences": True, "max_length": 30}, {"append_eod": False, "json_keys": ("text", "title")}],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_written_is_right(tmp_path: Path, job: Preprocessing, flags: dict[str, object], workers: int) -> None:
    records = [{"text": text, "title": text[:3] if len(text) % 2 else ""} for text in [*documents(60), "", "好"]]
    inputs = [
        write_records(tmp_path / "a.jsonl", records),
        write_records(tmp_path / "b.jsonl.gz", records[:40]),
        write_records(tmp_path / "c.parquet", records[30:]),
    ]
    job = dataclasses.replace(job, **flags)
    report = preprocess(inputs, tmp_path / "out", job, shard_tokens=2500)
    pairs = {key: [output.prefix for output in report.outputs if output.key == key] for key in job.json_keys}
    assert len(pairs["text"]) > 1
    expected = sum(totals.documents for totals in report.totals.values())
    assert verify(inputs, pairs, job, workers) == expected


def rewrite(prefix: Path, change: Callable[[list[list[np.ndarray]]], None]) -> None:
    """Write the pair anew with its documents changed."""
    with PairReader(prefix, "x") as pair:
        dtype = pair.header.dtype
        content = [pair.document(index) for index in range(pair.header.documents)]
    change(content)
    with IndexedWriter(prefix, dtype) as writer:
        sequences = [sequence for document in content for sequence in document]
        lengths = np.array(list(map(len, sequences)), np.int32)
        writer.add(np.concatenate(sequences).astype(dtype), lengths, np.array(list(map(len, content)), np.int32))


def one_token(content: list[list[np.ndarray]]) -> None:
    content[33][0] = content[33][0].copy()
    content[33][0][1] += 1


def swapped(content: list[list[np.ndarray]]) -> None:
    content[10], content[11] = content[11], content[10]


def one_less(content: list[list[np.ndarray]]) -> None:
    del content[-1]


def one_more(content: list[list[np.ndarray]]) -> None:
    content.append(content[0])


def joined(content: list[list[np.ndarray]]) -> None:
    content[20] = content[20] + content.pop(21)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_token, r"document 33 is not .*a\.jsonl line 35: \d+ tokens in 1 sequences \(.*\), expected \d+ tokens"),
        (swapped, r"document 10 is not .*a\.jsonl line 12: "),
        (one_less, r"document 60 is not .*a\.jsonl line 62: the pair ends before it, expected"),
        (one_more, r"holds 62 documents, but the input gives 61"),
        (joined, r"document 20 is not .*a\.jsonl line 22: \d+ tokens in 2 sequences"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, job: Preprocessing, change: Callable[[list[list[np.ndarray]]], None], message: str
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["", *documents(61)])
    preprocess([source], tmp_path / "out", job)
    rewrite(tmp_path / "out", lambda _: None)
    assert verify([source], {"text": [tmp_path / "out"]}, job) == 61
    rewrite(tmp_path / "out", change)
    with pytest.raises(UserError, match=rf"^verify {re.escape(str(tmp_path))}/out: {message}") as caught:
        verify([source], {"text": [tmp_path / "out"]}, job)
    assert "\n" not in str(caught.value)


def test_a_line_that_was_not_read_is_missed(
    tmp_path: Path, job: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault in cutting files would be in both ways to tokenize them, so lines are counted apart."""
    source = write_jsonl(tmp_path / "a.jsonl", documents(30))
    real = lines.LineReader.skip_to

    def skip_one_more(reader: lines.LineReader, start: int) -> None:
        real(reader, start + (start == 2000) * 500)

    monkeypatch.setattr(lines.LineReader, "skip_to", skip_one_more)
    preprocess([source], tmp_path / "out", job)
    with pytest.raises(UserError, match=r"a\.jsonl: has 30 records, but 2\d were read"):
        verify([source], {"text": [tmp_path / "out"]}, job)


def test_the_command_takes_all_from_the_report(
    tmp_path: Path, job: Preprocessing, tokenizer_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_records(tmp_path / "a.jsonl", [{"text": text, "t": "好"} for text in documents(5)])
    flags = dataclasses.replace(job, json_keys=("text", "t"), append_eod=False, max_length=30)
    preprocess([source], tmp_path / "out", flags)
    words = [str(tmp_path / "out"), "--tokenizer-model", str(tokenizer_model), "--workers", "1"]
    commands.verify_pairs("", words)
    assert capsys.readouterr().out == "verified: 10 documents are exactly what 1 input files give\n"
    # Moved, together with its report.
    (tmp_path / "else").mkdir()
    for path in tmp_path.glob("out*"):
        path.rename(tmp_path / "else" / path.name)
    commands.verify_pairs("", [str(tmp_path / "else" / "out"), *words[1:]])
    with pytest.raises(UserError, match=r"out\.report\.json: cannot be read: No such file"):
        commands.verify_pairs("", words)
    report = tmp_path / "else" / "out.report.json"
    content = json.loads(report.read_bytes())
    content["options"]["tokenizer_fingerprint"] = "other"
    report.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"--tokenizer-model .*tiny\.model: is not the one .*out was made with"):
        commands.verify_pairs("", [str(tmp_path / "else" / "out"), *words[1:]])


def test_a_pair_of_another_type(tmp_path: Path, job: Preprocessing) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["好"])
    preprocess([source], tmp_path / "out", job)
    for path, name in ((bin_path, "x.bin"), (idx_path, "x.idx")):
        path(tmp_path / "out").rename(tmp_path / name)
    with IndexedWriter(tmp_path / "out", np.dtype(np.int32)) as writer:
        writer.add(np.array([1], np.int32), np.array([1], np.int32))
    with pytest.raises(UserError, match=r"verify .*out: stores int32, this tokenizer needs uint16"):
        verify([source], {"text": [tmp_path / "out"]}, job)
