"""Contamination against a plain comparison of unit lists, also when hashes collide; options, evaluation files."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import UserError
from megatron_moe.data.dedup import Decontamination, Decontaminator
from megatron_moe.data.dedup import decontaminate as decontaminate_module
from megatron_moe.data.dedup.decontaminate import HashSet
from megatron_moe.data.dedup.units import Grams, Units, grams_of, unit_strings
from tests.data.dedup.near_copies import gram_set, random_documents

QUESTION = "下列关于黄河流域气候特点的说法，正确的是哪一项？"


def _evaluation(folder: Path, *texts: str, name: str = "eval.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def _decontaminator(folder: Path, *texts: str, **options: Any) -> Decontaminator:
    return Decontaminator(Decontamination(files=(_evaluation(folder, *texts),), **options))


def _found(decontaminator: Decontaminator, text: str) -> str | None:
    found = decontaminator.find([text])[0]
    return None if found is None else str(found)


@pytest.mark.parametrize(
    ("text", "run"),
    [
        (f"前文。{QUESTION}后文", "下列关于黄河流域气候特点的"),
        ("关于黄河\n流域 气候，特点的说法正确", "关于黄河流域气候特点的说法"),
        ("关于黄河流域气候特点的说", None),
        ("下列关于长江流域气候特点的说法，错误的是哪一项？", None),
        ("", None),
    ],
)
def test_thirteen_characters_in_a_row_contaminate(text: str, run: str | None, tmp_path: Path) -> None:
    decontaminator = _decontaminator(tmp_path, QUESTION)
    expected = None if run is None else f"eval.jsonl: {run}"
    assert _found(decontaminator, text) == expected
    found = decontaminator.find(["别的", text, "别的"])
    assert [None if each is None else str(each) for each in found] == [None, expected, None]


def test_thirteen_words_of_english_not_thirteen_letters(tmp_path: Path) -> None:
    english = "The quick brown fox jumps over the lazy dog while 42 other animals watch it closely"
    decontaminator = _decontaminator(tmp_path, english)
    assert _found(decontaminator, "the quick brown fox jumps over the lazy dog") is None
    found = _found(decontaminator, "Quick, brown FOX jumps over the lazy dog -- while ４２ other animals watch it.")
    assert found == "eval.jsonl: quick brown fox jumps over the lazy dog while 42 other animals watch"


def test_hits_and_share(tmp_path: Path) -> None:
    text = "甲乙丙丁" + QUESTION + "".join(random_documents(1, 400, seed=1))
    counts = _decontaminator(tmp_path, QUESTION).find([text])[0]
    assert counts is not None
    # 22 units make 10 runs.
    assert (counts.hits, counts.share) == (10, 10 / (len(unit_strings(text)) - 12))
    assert _found(_decontaminator(tmp_path, QUESTION, hits=10), text)
    assert _found(_decontaminator(tmp_path, QUESTION, hits=11), text) is None
    assert _found(_decontaminator(tmp_path, QUESTION, share=counts.share), text)
    assert _found(_decontaminator(tmp_path, QUESTION, share=counts.share + 0.001), text) is None
    # The same run twice is one hit.
    assert _found(_decontaminator(tmp_path, QUESTION, hits=11), QUESTION + "。甲。" + QUESTION) is None


def test_short_evaluation_texts_contaminate_documents_equal_to_them(tmp_path: Path) -> None:
    decontaminator = _decontaminator(tmp_path, "今天天气怎么样？", "。", QUESTION)
    assert _found(decontaminator, "今天，天气怎么样") == "eval.jsonl: 今天天气怎么样"
    assert _found(decontaminator, "请问今天天气怎么样？") is None
    assert _found(decontaminator, "！") is None
    (file,) = decontaminator.files
    assert (file.texts, file.short, file.empty, file.runs) == (3, 1, 1, 10)
    skipping = _decontaminator(tmp_path, "今天天气怎么样？", short="skip")
    assert _found(skipping, "今天天气怎么样？") is None
    assert skipping.files[0].short == 1


short_text = st.text(st.sampled_from("天地玄黄宇宙，。 ab１"), max_size=30)


@settings(max_examples=60)
@given(
    evaluation=st.lists(short_text, min_size=1, max_size=4),
    documents=st.lists(short_text, max_size=6),
    ngram=st.integers(1, 6),
    collide=st.booleans(),
)
def test_found_as_by_comparing_lists(
    evaluation: list[str], documents: list[str], ngram: int, collide: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("eval")
    runs = set().union(*(gram_set(text, ngram) for text in evaluation))
    short = [units for text in evaluation if 0 < len(units := unit_strings(text)) < ngram]
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            # Hashes of 3 bits, those above: a hit by hash says next to nothing.
            patch.setattr(decontaminate_module, "grams_of", _colliding)
        decontaminator = _decontaminator(folder, *evaluation, ngram=ngram)
        found = decontaminator.find(documents)
        one_by_one = [_found(decontaminator, text) for text in documents]
    for text, contamination in zip(documents, found, strict=True):
        expected = bool(gram_set(text, ngram) & runs) or unit_strings(text) in short
        if collide and contamination is None:
            # Of evaluation runs with the same hash only the first is known, so some are missed.
            continue
        assert (contamination is not None) == expected
    assert [None if each is None else str(each) for each in found] == one_by_one


def _colliding(units: Units, n: int) -> Grams:
    grams = grams_of(units, n)
    return dataclasses.replace(grams, hashes=grams.hashes >> np.uint64(61) << np.uint64(61))


@given(st.sets(st.integers(0, 2**64 - 1)), st.lists(st.integers(0, 2**64 - 1)))
def test_hash_sets_find_what_is_in_them(known: set[int], others: list[int]) -> None:
    ordered = sorted(known)
    wanted = [*others, *ordered, 2**64 - 1, 0]
    places, found = HashSet(np.array(ordered, dtype=np.uint64)).find(np.array(wanted, dtype=np.uint64))
    expected = [(place, ordered.index(value)) for place, value in enumerate(wanted) if value in known]
    assert list(zip(places.tolist(), found.tolist(), strict=True)) == expected


def test_long_documents_in_many_pieces(tmp_path: Path) -> None:
    documents = random_documents(60, 2000, seed=3)
    planted = {7: documents[7][:900] + QUESTION + documents[7][900:], 59: QUESTION + documents[59]}
    batch = [planted.get(index, text) for index, text in enumerate(documents)]
    decontaminator = _decontaminator(tmp_path, *random_documents(50, 200, seed=4), QUESTION)
    found = decontaminator.find(batch)
    assert [index for index, each in enumerate(found) if each] == [7, 59]
    assert [index for index, text in enumerate(batch) if _found(decontaminator, text)] == [7, 59]


def test_nothing_to_compare_with() -> None:
    assert Decontaminator(Decontamination()).find(["天地玄黄宇宙洪荒日月盈昃辰宿列张"]) == [None]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.jsonl.gz", "list.json"]
)
def test_every_kind_of_evaluation_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    records = [{"id": "无关的标识符号写得很长很长很长的", "question": QUESTION}, {"id": "b", "question": "短"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif name == "list.json":
        path.write_text(json.dumps({"data": [{"meta": records}]}))
    elif name in ("a.csv", "a.tsv"):
        rows = [f"id,question\n{records[0]['id']},“{QUESTION}”\nb,短\n"]
        path.write_text("\ufeff" + rows[0].replace(",", "\t" if name == "a.tsv" else ","))
    elif name == "a.txt":
        path.write_text(f"{QUESTION}\n短\n")
    else:
        path.write_text(lines)
    decontaminator = Decontaminator(Decontamination(files=(str(path),), fields=("question",)))
    assert _found(decontaminator, QUESTION) == f"{name}: 下列关于黄河流域气候特点的"
    assert _found(decontaminator, "无关的标识符号写得很长很长很长的") is None
    if name != "a.txt":
        everything = Decontaminator(Decontamination(files=(str(path),)))
        assert _found(everything, "无关的标识符号写得很长很长很长的") is not None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl: line 2 is no JSON: "),
        ("a.jsonl", b'{"number": 3}\n', "a.jsonl: holds no text"),
        ("a.txt", "好".encode("gbk"), "a.txt: byte 0 is no UTF-8; convert the file"),
        ("a.doc", b"x", "a.doc: is not a kind of evaluation file known here: .jsonl .json "),
        ("a.parquet", b"x", "a.parquet: is no readable Parquet file: "),
        ("a.txt.gz", b"x", "a.txt.gz: cannot read it to the end: "),
        ("none.txt", None, "none.txt: cannot be read: No such file or directory"),
    ],
)
def test_files_that_cannot_be_used_are_named(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        Decontaminator(Decontamination(files=(str(tmp_path / name),)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_field_that_no_record_has(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.jsonl: holds no field answer or choices with text"):
        _decontaminator(tmp_path, QUESTION, fields=("answer", "choices"))
