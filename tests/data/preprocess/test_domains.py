"""Domains of documents: written with any number of workers and after a stop, checked, shown, merged, counted."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data import domains as domain_files
from megatron_moe.data.domains import read_domains
from megatron_moe.data.indexed import open_indexed
from megatron_moe.data.preprocess import Preprocessing, assemble, commands, preprocess, tasks
from megatron_moe.data.preprocess.counts import count_tokens
from megatron_moe.data.preprocess.lengths import describe, measure
from megatron_moe.data.preprocess.merge import merge
from megatron_moe.data.preprocess.show import inspect
from megatron_moe.data.preprocess.verify import verify
from tests.data.preprocess.helpers import same_pair, write_records

KINDS = ("news", "books", "forum")
# Ids 0 to 99, the last of which ends documents; a text is numbers.
DATA = DataConfig(tokenizer_type="NullTokenizer")
JOB = Preprocessing(data=DATA, vocab_size=100, domain_key="dataType")


def records(seed: int, count: int = 120, kinds: Sequence[str] = KINDS) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [
        {
            # Some are empty, and left out of the pair.
            "text": " ".join(str(rng.randrange(99)) for _ in range(rng.choice([0, 1, 5, 30]))),
            "title": " ".join(str(rng.randrange(99)) for _ in range(rng.choice([0, 3]))),
            "dataType": rng.choice(kinds),
        }
        for _ in range(count)
    ]


def expected(rows: Sequence[dict[str, str]], key: str = "text") -> list[str]:
    return [row["dataType"] for row in rows if row[key]]


def named(prefix: Path) -> list[str]:
    found = read_domains(prefix, len(open_indexed(prefix).lengths))
    return [found.names[number] for number in found.ids.tolist()]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "_SMALL_PIECE", 1500)
    monkeypatch.setattr(assemble, "_BLOCK", 7)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
@pytest.mark.usefixtures("small_pieces")
def test_every_document_has_its_domain(tmp_path: Path, kind: str) -> None:
    """Numbered as they first occur; the pair is the same as without domains."""
    rows = [records(1), records(2)]
    files = [write_records(tmp_path / f"{number}.{kind}", part) for number, part in enumerate(rows)]
    every = [*rows[0], *rows[1]]
    report = preprocess(files, tmp_path / "out", JOB)
    assert report.parts > 3
    assert named(tmp_path / "out") == expected(every)
    assert list(read_domains(tmp_path / "out", report.totals["text"].documents).names) == list(
        dict.fromkeys(row["dataType"] for row in every)
    )
    assert verify(files, {"text": [tmp_path / "out"]}, JOB) == len(expected(every))
    preprocess(files, tmp_path / "plain", Preprocessing(data=DATA, vocab_size=100))
    assert same_pair(tmp_path / "out", tmp_path / "plain")
    assert not (tmp_path / "plain.domains.npy").exists()


@pytest.mark.usefixtures("small_pieces")
def test_fields_shards_and_names_that_are_given(tmp_path: Path) -> None:
    rows = records(3, 200)
    file = write_records(tmp_path / "in.jsonl", rows)
    names = ("law", "forum", "news", "books")
    job = Preprocessing(
        data=DATA,
        vocab_size=100,
        json_keys=("text", "title"),
        split_sentences=True,
        domain_key="dataType",
        domains=names,
    )
    report = preprocess([file], tmp_path / "out", job, shard_tokens=300)
    for key in ("text", "title"):
        prefixes = [output.prefix for output in report.outputs if output.key == key]
        assert len(prefixes) > 1
        assert [name for prefix in prefixes for name in named(prefix)] == expected(rows, key)
        assert all(read_domains(p, len(open_indexed(p).lengths)).names == names for p in prefixes)


@pytest.mark.usefixtures("small_pieces")
def test_a_stopped_run_goes_on_and_old_domains_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = records(4)
    file = write_records(tmp_path / "in.jsonl", rows)
    preprocess([file], tmp_path / "whole", JOB)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    # After the parts are made, and after the pair stands but not yet its domains.
    for name in ("discard_old", "publish"):
        with monkeypatch.context() as patched:
            patched.setattr(domain_files.DomainsWriter, name, stop)
            with pytest.raises(KeyboardInterrupt):
                preprocess([file], tmp_path / "out", JOB)
        assert not (tmp_path / "out.domains.json").exists()
    report = preprocess([file], tmp_path / "out", JOB)
    assert report.resumed == report.parts
    for ending in (".domains.npy", ".domains.json", ".bin", ".idx"):
        assert (tmp_path / f"out{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    # The same name without domains: none are left that would be another pair's.
    preprocess([file], tmp_path / "out", Preprocessing(data=DATA, vocab_size=100))
    assert not list(tmp_path.glob("out.domains.*"))


def test_what_cannot_be_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = records(5, 20)
    file = write_records(tmp_path / "in.jsonl", rows)
    text = write_records(tmp_path / "in.txt", rows)
    base = {"data": DATA, "vocab_size": 100}
    first = next(number for number, row in enumerate(rows, start=1) if row["dataType"] == "forum")
    for job, source, problem in (
        (Preprocessing(**base, domain_key="kind"), file, r"in.jsonl line 1: no field 'kind' \(--domain-key\)"),
        (Preprocessing(**base, domain_key="dataType"), text, "--domain-key dataType: .*in.txt is plain text"),
        (
            Preprocessing(**base, domain_key="dataType", domains=("news", "books")),
            file,
            f"in.jsonl line {first}: domain 'forum' is none of --domains news books",
        ),
    ):
        with pytest.raises(UserError, match=problem):
            preprocess([source], tmp_path / "out", job)
    monkeypatch.setattr("megatron_moe.data.preprocess.work.MOST_DOMAINS", 2)
    with pytest.raises(UserError, match=f"line {first}: --domain-key dataType has more than 2 different values"):
        preprocess([file], tmp_path / "out", JOB)
    for flags, problem in (
        ({"domains": ("a",)}, "--domains: needs --domain-key"),
        ({"domain_key": "d", "domains": ("a", "a")}, "--domains a: is given twice"),
        ({"domain_key": "text"}, "--domain-key text: is one of --json-keys"),
    ):
        with pytest.raises(ConfigError, match=problem):
            Preprocessing(**base, **flags)


def test_verify_sees_a_wrong_domain(tmp_path: Path) -> None:
    rows = records(6)
    file = write_records(tmp_path / "in.jsonl", rows)
    preprocess([file], tmp_path / "out", JOB)
    ids = np.load(tmp_path / "out.domains.npy")
    wrong = int(np.flatnonzero(ids != ids[-1])[3])
    ids[[wrong, -1]] = ids[[-1, wrong]]
    np.save(tmp_path / "out.domains.npy", ids)
    with pytest.raises(UserError, match=f"the domain of document {wrong} is .*, .*in.jsonl line .* says "):
        verify([file], {"text": [tmp_path / "out"]}, JOB)


@pytest.mark.parametrize("damage", ["cut", "other", "objects", "names", "none"])
def test_damage_is_seen(tmp_path: Path, damage: str) -> None:
    preprocess([write_records(tmp_path / "in.jsonl", records(7))], tmp_path / "out", JOB)
    path, names = tmp_path / "out.domains.npy", tmp_path / "out.domains.json"
    documents = len(open_indexed(tmp_path / "out").lengths)
    ids = np.load(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "other":
        ids[0] = (ids[0] + 1) % 3
        np.save(path, ids)
    elif damage == "objects":
        np.save(path, np.array([{}]), allow_pickle=True)
    elif damage == "names":
        names.write_text(json.dumps({"names": ["a"], "documents": [1, 2]}))
    else:
        names.unlink()
    message = "no file .*out.domains.json" if damage == "none" else "is damaged or of another pair"
    with pytest.raises(UserError, match=f"{message}.*--domain-key FIELD"):
        read_domains(tmp_path / "out", documents)


def test_merged_pairs_keep_their_domains(tmp_path: Path) -> None:
    rows = [records(8), records(9), records(10, kinds=("news",))]
    for number, part in enumerate(rows):
        file = write_records(tmp_path / f"{number}.jsonl", part)
        job = Preprocessing(data=DATA, vocab_size=100, domain_key="dataType", domains=KINDS if number < 2 else None)
        preprocess([file], tmp_path / f"{number}", job)
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "all")
    assert named(tmp_path / "all") == expected(rows[0]) + expected(rows[1])
    with pytest.raises(UserError, match=r"merge .*2: its domains are news, those of .*0 news, books, forum; make both"):
        merge([tmp_path / "0", tmp_path / "2"], tmp_path / "bad")
    for ending in ("bin", "idx"):
        shutil.copy(tmp_path / f"1.{ending}", tmp_path / f"bare.{ending}")
    with pytest.raises(UserError, match=r"merge .*bare: has no domains, but .*0 has"):
        merge([tmp_path / "bare", tmp_path / "0"], tmp_path / "bad")
    assert not list(tmp_path.glob("bad*"))


def test_what_is_shown_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = records(11)
    file = write_records(tmp_path / "in.jsonl", rows)
    job = Preprocessing(data=DATA, vocab_size=100, domain_key="dataType", domains=KINDS)
    preprocess([file], tmp_path / "out", job)
    counts = np.zeros((3, 100), np.int64)
    for row in rows:
        for token in row["text"].split():
            counts[KINDS.index(row["dataType"]), int(token)] += 1
        counts[KINDS.index(row["dataType"]), 99] += bool(row["text"])
    np.testing.assert_array_equal(count_tokens([tmp_path / "out"]), counts)
    commands.write_counts("", [str(tmp_path / "out"), "--output", str(tmp_path / "counts.npy")])
    np.testing.assert_array_equal(np.load(tmp_path / "counts.npy"), counts)
    assert f"{counts.sum():,} tokens of 100 ids in 3 domains" in capsys.readouterr().out
    domain_files.remove_domains(tmp_path / "out")
    np.testing.assert_array_equal(count_tokens([tmp_path / "out"]), counts.sum(axis=0))
    with pytest.raises(UserError, match=r"counts .*out: holds token id 99, but the vocabulary has 99"):
        count_tokens([tmp_path / "out"], 99)
    preprocess([file], tmp_path / "out", job)
    documents = expected(rows)
    shown = "\n".join(inspect(tmp_path / "out", None, [2], 0))
    assert "domains: 0 news (" + str(documents.count("news")) in shown
    assert f"--- document 2 of {documents[2]}:" in shown
    stats = describe(measure(tmp_path / "out"))
    assert f"domain 2 forum: {documents.count('forum'):,} documents, {counts[2].sum():,} tokens" in stats
