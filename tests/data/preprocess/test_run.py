"""Tokenizing files: what is written is what megatron-core would write, for any input format and number of processes."""

import dataclasses
import gzip
import itertools
import json
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.documents import read_documents
from megatron_moe.data.indexed import open_indexed
from megatron_moe.data.preprocess import Preprocessing, preprocess, tasks
from megatron_moe.data.preprocess.sentences import split_sentences
from megatron_moe.data.tokenizer.load import NullTokenizer, SentencePieceTokenizer, Tokenizer
from tests.data.chinese_text import documents, write_jsonl
from tests.data.preprocess.helpers import megatron_pair, same_pair, write_records


@pytest.fixture
def job(tokenizer_model: Path) -> Preprocessing:
    return Preprocessing(data=DataConfig(tokenizer_model=str(tokenizer_model)))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_SMALL_PIECE", 2000)


def megatron_documents(texts: list[str], tokenizer: Tokenizer, split: bool = False) -> list[list[list[int]]]:
    """As `Encoder.encode` of Megatron-LM's tools/preprocess_data.py, without the empty ones."""
    result = []
    for text in texts:
        sentences = [tokenizer.encode(sentence) for sentence in (split_sentences(text) if split else [text])]
        sentences = [ids for ids in sentences if ids]
        if sentences:
            sentences[-1].append(tokenizer.eod)
            result.append(sentences)
    return result


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.usefixtures("small_pieces")
def test_bytes_are_those_of_megatron_core(
    tmp_path: Path, job: Preprocessing, tokenizer_model: Path, split: bool
) -> None:
    texts = ["\u2581 特 殊", *documents(60), "", "\n", "最后"]
    inputs = [write_jsonl(tmp_path / "b.jsonl", texts[:33]), write_jsonl(tmp_path / "a.jsonl", texts[33:])]
    report = preprocess(inputs, tmp_path / "ours", dataclasses.replace(job, split_sentences=split))
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    expected = megatron_documents(texts, tokenizer, split)
    megatron_pair(tmp_path / "theirs", expected, tokenizer.vocab_size)
    assert same_pair(tmp_path / "ours", tmp_path / "theirs")
    totals = report.totals["text"]
    assert (totals.documents, totals.empty) == (63, 1)
    assert totals.sequences == sum(map(len, expected)) > 63 * (1 + split) - 1
    # One peer adds up running totals, and reports sixteen times as many.
    assert totals.tokens == sum(len(ids) for document in expected for ids in document)
    assert totals.chars_per_token == pytest.approx(sum(map(len, texts)) / totals.tokens)
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[index].tolist() for index in range(len(dataset))] == [ids for ids_ in expected for ids in ids_]
    assert dataset.document_indices.tolist()[-1] == totals.sequences


def test_a_large_vocabulary_takes_four_bytes(tmp_path: Path) -> None:
    job = Preprocessing(data=DataConfig(tokenizer_type="NullTokenizer"), vocab_size=70_000)
    texts = ["3 69998 5", "", "7"]
    preprocess([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "ours", job)
    megatron_pair(tmp_path / "theirs", megatron_documents(texts, NullTokenizer(70_000)), 70_000)
    assert same_pair(tmp_path / "ours", tmp_path / "theirs")
    assert open_indexed(tmp_path / "ours").tokens.tolist() == [3, 69998, 5, 69999, 7, 69999]


@pytest.mark.usefixtures("small_pieces")
def test_any_number_of_processes_writes_the_same_files(tmp_path: Path, job: Preprocessing) -> None:
    """Of compressed files nobody knows beforehand how many pieces they have."""
    inputs = [
        write_jsonl(tmp_path / "a.jsonl", documents(60)),
        write_records(tmp_path / "b.jsonl.gz", [{"text": text} for text in documents(60, 1)]),
        write_jsonl(tmp_path / "c.jsonl", documents(9, 2)),
    ]
    for workers in (1, 2, 3):
        (tmp_path / str(workers)).mkdir()
        preprocess(inputs, tmp_path / str(workers) / "out", job, workers=workers, shard_tokens=3000)
    first, *others = (
        {path.name: path.read_bytes() for path in (tmp_path / str(workers)).iterdir()} for workers in (1, 2, 3)
    )
    assert len(first) > 4
    for other in others:
        report = other["out.report.json"].replace(b"/2/out", b"/1/out").replace(b"/3/out", b"/1/out")
        assert other | {"out.report.json": report} == first


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt", "a.txt.zst", "deep/a.jsonl"]
)
@pytest.mark.usefixtures("small_pieces")
def test_every_format_gives_the_same_pair(tmp_path: Path, job: Preprocessing, name: str) -> None:
    texts = [text.replace("\n", "") for text in documents(50)] + [""]
    write_records(tmp_path / "in" / name, [{"text": text, "title": "x"} for text in texts])
    # What tools leave beside data is not data.
    (tmp_path / "in" / "other.report.json").write_text("{}")
    preprocess([tmp_path / "in"], tmp_path / "out", job)
    preprocess([write_jsonl(tmp_path / "plain.jsonl", texts)], tmp_path / "plain", job)
    assert same_pair(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, job: Preprocessing, name: str) -> None:
    records = [{"text": text} for text in ("第一行。", "\ufeff第二行。")]
    path = write_records(tmp_path / name, records)
    preprocess([path], tmp_path / "plain", job)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    preprocess([path], tmp_path / "marked", job)
    assert same_pair(tmp_path / "plain", tmp_path / "marked")
    # Read by the one who builds tokenizers too.
    assert next(iter(read_documents(path, "text"))).rstrip("\n") == "第一行。"


def test_several_fields_are_all_finished(tmp_path: Path, job: Preprocessing, tokenizer_model: Path) -> None:
    records = [{"text": text, "title": text[:4] if place % 3 else ""} for place, text in enumerate(documents(20))]
    source = write_records(tmp_path / "a.jsonl", records)
    report = preprocess([source], tmp_path / "out", dataclasses.replace(job, json_keys=("title", "text")))
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    for key in ("text", "title"):
        expected = megatron_documents([record[key] for record in records], tokenizer)
        megatron_pair(tmp_path / f"theirs_{key}", expected, tokenizer.vocab_size)
        assert same_pair(tmp_path / f"out_{key}", tmp_path / f"theirs_{key}")
    assert [output.prefix.name for output in report.outputs] == ["out_title", "out_text"]
    assert (report.totals["title"].documents, report.totals["title"].empty) == (13, 7)
    with pytest.raises(
        UserError, match=r"a\.jsonl line 1: no field 'name' \(--json-key\); fields here: 'text', 'title'"
    ):
        preprocess([source], tmp_path / "out", dataclasses.replace(job, json_keys=("text", "name")))


def test_cut_documents_are_counted(tmp_path: Path, job: Preprocessing, tokenizer_model: Path) -> None:
    texts = documents(30)
    preprocess([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "whole", job)
    cut_job = dataclasses.replace(job, max_length=20)
    report = preprocess([tmp_path / "a.jsonl"], tmp_path / "cut", cut_job)
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    whole, cut = open_indexed(tmp_path / "whole"), open_indexed(tmp_path / "cut")
    for index in range(30):
        document = whole.document(index).tolist()
        expected = document if len(document) <= 20 else [*document[:19], tokenizer.eod]
        assert cut.document(index).tolist() == expected
    totals = report.totals["text"]
    assert totals.cut_documents == int((whole.lengths > 20).sum()) > 3
    assert totals.cut_tokens == whole.num_tokens - cut.num_tokens
    assert totals.tokens == cut.num_tokens


@pytest.mark.usefixtures("small_pieces")
def test_shards_hold_all_documents_in_order(tmp_path: Path, job: Preprocessing) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", documents(80))
    preprocess([source], tmp_path / "one", job)
    one = open_indexed(tmp_path / "one")
    limit = int(one.lengths.max()) + 40
    report = preprocess([source], tmp_path / "many", job, shard_tokens=limit)
    shards = [open_indexed(output.prefix) for output in report.outputs]
    names = [f"many-{index:05d}-of-{len(shards):05d}" for index in range(len(shards))]
    assert [output.prefix.name for output in report.outputs] == names
    found = [shard.document(index).tolist() for shard in shards for index in range(len(shard.lengths))]
    assert found == [one.document(index).tolist() for index in range(80)]
    # As full as they can be: the first document of the next one would be too much.
    for shard, following in itertools.pairwise(shards):
        assert shard.num_tokens <= limit < shard.num_tokens + int(following.lengths[0])
    # A document over the limit is a shard of its own.
    assert len(preprocess([source], tmp_path / "single", job, shard_tokens=1).outputs) == 80


def test_the_report_says_it_all(tmp_path: Path, job: Preprocessing, tokenizer_model: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["你好", "", "再见。好"])
    report = preprocess([source], tmp_path / "out", job)
    saved = json.loads(report.file.read_bytes())
    assert report.file == tmp_path / "out.report.json"
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    assert saved["options"]["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert saved["options"]["append_eod"] is True
    assert saved["inputs"] == [{"file": str(source), "bytes": source.stat().st_size, "records": 3}]
    tokens = len(tokenizer.encode("你好")) + len(tokenizer.encode("再见。好")) + 2
    assert saved["outputs"] == [
        {"prefix": str(tmp_path / "out"), "key": "text", "documents": 2, "sequences": 2, "tokens": tokens}
    ]
    totals = saved["totals"]["text"]
    assert (totals["empty"], totals["characters"], totals["text_bytes"]) == (1, 6, 18)


def test_without_end_of_document(tmp_path: Path, tokenizer_model: Path) -> None:
    job = Preprocessing(data=DataConfig(tokenizer_model=str(tokenizer_model)), append_eod=False)
    preprocess([write_jsonl(tmp_path / "a.jsonl", ["好", "再见"])], tmp_path / "pair", job)
    eod = SentencePieceTokenizer(tokenizer_model).eod
    assert eod not in open_indexed(tmp_path / "pair").tokens


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("small_pieces")
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n\n{"text": "b"}\n', "line 2: empty line"),
        (b'[{"text": "a"},\n{"text": "b"}]', "is a JSON array, not JSON Lines; tools/clean_wudao.py reads arrays"),
        (b'{"text": "a"}\n[1]\n', "line 2: expected a JSON object with the field 'text', got list"),
        (b'{"text": "a"}\n{"text": null}\n', "line 2: field 'text' must be a string, got NoneType"),
        (b'{"text": "\\ud800"}\n', "line 1: half of a surrogate pair"),
        (b'{"text": "\xff"}\n', "line 1: not UTF-8"),
        (
            b'{"text": "' + "长".encode() * 400 + b'"}\n',
            "line 1: a text of 1,200 bytes, over --max-document-bytes 1,000",
        ),
        (b'{"text": "' + b"x" * (2 << 20) + b'"}\n', "the line at byte 0 is over 4,000 bytes"),
    ],
)
def test_bad_records_are_named(tmp_path: Path, job: Preprocessing, content: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        preprocess([tmp_path / "a.jsonl"], tmp_path / "out", dataclasses.replace(job, max_document_bytes=1000))
    # Nothing was finished, so nothing is kept.
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.usefixtures("small_pieces")
def test_bad_files_are_named(tmp_path: Path, job: Preprocessing) -> None:
    content = gzip.compress("".join(f'{{"text": "{number}"}}\n' for number in range(9999)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: cannot read it to the end"):
        preprocess([tmp_path / "cut.jsonl.gz"], tmp_path / "out1", job)
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"no\.parquet: not Parquet, or damaged"):
        preprocess([tmp_path / "no.parquet"], tmp_path / "out2", job)
    source = write_records(tmp_path / "a.parquet", [{"body": "a"}])
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text' \(--json-keys\); columns here: 'body'"):
        preprocess([source], tmp_path / "out3", job)
    with pytest.raises(UserError, match=r"--json-keys text title: .*a\.txt is plain text and has no fields"):
        preprocess(
            [write_records(tmp_path / "a.txt", [{"text": "a"}])],
            tmp_path / "out4",
            dataclasses.replace(job, json_keys=("text", "title")),
        )


def test_line_numbers_count_from_the_file_s_beginning(tmp_path: Path, job: Preprocessing, small_pieces: None) -> None:
    records = [{"text": text} for text in documents(100)]
    for name in ("a.jsonl", "a.jsonl.zst", "a.parquet"):
        path = write_records(tmp_path / name, [*records, {"text": "x" * 2000}])
        with pytest.raises(UserError, match=rf"{name} (line 101|row 100): a text of 2,000 bytes"):
            preprocess([path], tmp_path / f"out-{name}", dataclasses.replace(job, max_document_bytes=1900))
