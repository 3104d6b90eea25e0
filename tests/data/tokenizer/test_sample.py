"""The sample: uniform, the same in any order of reading, in bounded memory; nothing held out is learned from."""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.reading import read_all
from megatron_moe.data.tokenizer.sample import SampleOptions, SmallestKeys, place_keys, read_sample, read_texts
from tests.data.chinese_text import documents, write_jsonl


@given(st.lists(st.integers(0, 2**60), unique=True, max_size=3000), st.integers(1, 200), st.randoms())
def test_the_smallest_keys_are_kept_in_the_order_of_places(places: list[int], size: int, order: object) -> None:
    keys = place_keys(np.array(places, np.uint64), seed=7)
    expected = sorted(sorted(places, key=lambda place: keys[places.index(place)])[:size]) if len(places) < 50 else None
    smallest = set(np.array(places, np.uint64)[np.argsort(keys)[:size]].tolist())
    shuffled = list(places)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = SmallestKeys[int](size), SmallestKeys[int](size)
    for number, start in enumerate(range(0, len(shuffled), 97)):
        part = shuffled[start : start + 97]
        array = np.array(part, np.uint64)
        (one if number % 2 else other).add(place_keys(array, 7), array, part)
    one.merge(other)
    kept = one.in_order()
    assert kept == sorted(kept)
    assert set(kept) == smallest
    assert expected is None or kept == expected


def test_no_more_than_a_little_over_the_size_is_held() -> None:
    kept = SmallestKeys[str](1000)
    for start in range(0, 200_000, 500):
        places = np.arange(start, start + 500, dtype=np.uint64)
        kept.add(place_keys(places, 0), places, [""] * 500)
        assert len(kept._items) <= 1000 + 250 + 1024
    assert len(kept.in_order()) == 1000


def test_keys_differ_and_the_sample_is_uniform() -> None:
    places = np.concatenate([np.arange(50_000, dtype=np.uint64) + np.uint64(file << 40) for file in range(2)])
    keys = place_keys(places, 1234)
    assert len(np.unique(keys)) == len(places)
    chosen = np.flatnonzero(np.argsort(np.argsort(keys)) < 10_000)
    # Each tenth of the places holds a tenth of the sample: 1000 give or take five standard deviations of 30.
    counts = np.bincount(chosen // 10_000, minlength=10)
    assert np.all(np.abs(counts - 1000) < 150)
    assert not np.array_equal(keys, place_keys(places, 1235))


def test_a_sample_does_not_depend_on_who_reads_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_moe.data.tokenizer.reading._WORTH_A_PROCESS", 1)
    files = [write_jsonl(tmp_path / f"{seed}.jsonl", documents(200, seed)) for seed in range(3)]
    options = SampleOptions(sentences=100, heldout_every=5)
    read: list[int] = []
    samples = [read_all(files, options, workers, read.append) for workers in (1, 3)]
    assert sum(read) == 2 * sum(path.stat().st_size for path in files)
    one, three = samples
    assert one.kept.in_order() == three.kept.in_order()
    assert one.heldout.in_order() == three.heldout.in_order()
    assert (one.documents, one.sentences) == (three.documents, three.sentences) == (600, one.sentences)
    assert len(one.kept.in_order()) == 100 < one.sentences
    everything = read_all(files, SampleOptions(heldout_every=0), 1, read.append)
    keys, places = everything.kept._joined()
    assert len(np.unique(keys)) == len(np.unique(places)) == everything.sentences


def test_documents_are_held_out_by_their_text(tmp_path: Path) -> None:
    texts = documents(300)
    path = write_jsonl(tmp_path / "a.jsonl", texts + texts[::-1])
    sample = read_sample(path, 0, SampleOptions(heldout_every=10))
    held_out = {text for _, text in sample.heldout.in_order()}
    assert 0 < len(held_out) < 100
    learned = Counter(sample.kept.in_order())
    assert sample.heldout_documents == sum(2 * texts.count(text) for text in held_out) / 1
    for text in texts:
        for line in text.split("\n"):
            if line not in learned:
                assert any(line in other for other in held_out)
    only_held_out = {line for text in held_out for line in text.split("\n")}
    only_held_out -= {line for text in texts if text not in held_out for line in text.split("\n")}
    assert not only_held_out & set(learned)
    assert read_sample(path, 0, SampleOptions(heldout_every=0)).heldout_documents == 0


def test_all_formats_give_the_same_texts(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    zstandard = pytest.importorskip("zstandard")
    texts = [text.replace("\n", " ") for text in documents(1500)]
    records = [{"text": text, "dataType": "新闻" if place % 2 else ""} for place, text in enumerate(texts)]
    lines = "".join(json.dumps(record, ensure_ascii=bool(place % 3)) + "\n" for place, record in enumerate(records))
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"):
        read: list[int] = []
        found = list(read_texts(tmp_path / name, SampleOptions(), read.append))
        assert [text.rstrip("\n") for text, _ in found] == texts
        groups = {"a"} if name == "a.txt" else {"新闻", "a"}
        assert {group for _, group in found} == groups
        assert sum(read) == (tmp_path / name).stat().st_size


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"a\.jsonl line 2: not JSON"),
        (b'{"txet": "a"}', r"a\.jsonl line 2: no field 'text' \(--json-key\); fields here: 'txet'"),
        (b'{"text": 3}', r"a\.jsonl line 2: field 'text' must be a string, got int"),
        (b'{"text": "\\ud800"}', r"a\.jsonl line 2: half of a surrogate pair"),
        (b'{"text": "\xff"}', r"a\.jsonl line 2: not UTF-8"),
        (b"[]", r"a\.jsonl line 2: expected a JSON object"),
        (b"", r"a\.jsonl line 2: empty line"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        read_sample(path, 0, SampleOptions())


def test_a_bad_file_in_another_process_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_moe.data.tokenizer.reading._WORTH_A_PROCESS", 1)
    good = write_jsonl(tmp_path / "a.jsonl", documents(100))
    bad = tmp_path / "b.jsonl"
    bad.write_text("no JSON\n" * 100, encoding="utf-8")
    with pytest.raises(UserError, match=r"b\.jsonl line 1: not JSON"):
        read_all([good, bad], SampleOptions(), 2, lambda size: None)
