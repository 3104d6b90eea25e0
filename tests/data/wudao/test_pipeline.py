"""A job writes the same bytes whatever works on it and whatever interrupts it, and its report adds up."""

import contextlib
import gzip
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import psutil
import pyarrow
import pytest
from pyarrow import parquet

from megatron_moe.config.base import UserError
from megatron_moe.data.files import expand_inputs
from megatron_moe.data.wudao import executors
from megatron_moe.data.wudao.command import main
from megatron_moe.data.wudao.executors import TaskFailedError, run_local
from megatron_moe.data.wudao.job import STAGES, Job, Settings, create_job
from megatron_moe.data.wudao.report import read_report
from megatron_moe.data.wudao.shards import shard_lines
from tests.data.chinese_text import documents

TOOL = Path(__file__).parents[3] / "tools" / "clean_wudao.py"
RECIPE = """
record: {text: text, title: title, keep: [id, dataType]}
near_dedup: {}
rules:
  - control
  - whitespace
  - length: {least: 5}
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with an array of 400 KB, a gzip of lines and Parquet, with equal and similar texts among them."""
    random_ = random.Random(7)
    texts = ["".join(random_.sample(text, len(text))) for text in documents(1_500, seed=3)]
    texts[700] = texts[3]
    texts[1_400] = texts[600]
    texts[1_300] = texts[5][:-4] + "增删改。"
    texts[20] = "短。"
    texts[30] += "  \t \x07\n\n\n\n行尾  "
    records = [
        {"id": number, "dataType": "百科" if number % 3 else "博客", "title": f"题{number}", "content": text}
        for number, text in enumerate(texts)
    ]
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.json").write_bytes(b"[\n" + b",\n".join(map(orjson.dumps, records[:900])) + b"\n]\n")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(orjson.dumps(r) + b"\n" for r in records[900:1_200])))
    parquet.write_table(pyarrow.Table.from_pylist(records[1_200:]), folder / "c.parquet", row_group_size=100)
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def plan(corpus: Path, output: Path, recipe: Path, *changes: str, **settings: Any) -> Job:
    job, finished = create_job([corpus], output, Settings(str(recipe), changes, range_bytes=1 << 16, **settings))
    assert not finished
    return job


def command(corpus: Path, output: Path, recipe: Path, *flags: str) -> list[str]:
    paths = ["--input", str(corpus), "--output", str(output), "--recipe", str(recipe)]
    return [sys.executable, str(TOOL), *paths, *flags]


def contents(output: Path) -> dict[str, bytes]:
    """All that the user gets, but for the timings."""
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file() and path.name != "timings.json"}


def written(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for task in job.tasks for line in shard_lines(job.final_shard(task))]


@pytest.fixture
def finished(corpus: Path, recipe: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    job = plan(corpus, tmp_path / "finished", recipe)
    run_local(job, workers=1)
    return contents(job.output)


def test_the_report_adds_up(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    job = plan(corpus, tmp_path / "out", recipe)
    run_local(job, workers=1)
    report = read_report(job.output)
    records = written(job)
    dedup = report["dedup"]
    assert report["read"]["documents"] == 1_500
    assert {rule["rule"]: rule["dropped"] for rule in report["rules"]} == {"control": 0, "whitespace": 0, "length": 1}
    assert (dedup["exact"], dedup["near"]) == (2, 1)
    assert report["written"]["documents"] == len(records) == 1_496
    assert report["written"]["characters"] == sum(len(record["text"]) for record in records)
    assert report["written"]["bytes"] == sum(len(record["text"].encode()) for record in records)
    assert sum(report["written"]["lengths"].values()) == 1_496
    by_type = report["written"]["by_type"]
    assert by_type["博客"]["documents"] == sum(record["dataType"] == "博客" for record in records)
    assert by_type["博客"]["characters"] == sum(len(r["text"]) for r in records if r["dataType"] == "博客")
    # The first of equal documents is kept, and order stays.
    assert [record["id"] for record in records] == [n for n in range(1_500) if n not in (20, 700, 1_300, 1_400)]
    assert records[3]["title"] == "题3"
    changes = {rule["rule"]: rule["samples"] for rule in report["rules"]}
    assert "\x07" in changes["control"][0]["before"]
    assert "\x07" not in changes["control"][0]["after"]
    assert changes["length"][0]["before"] == "短。"
    near = dedup["samples"]["near"][0]
    assert near["before"] != near["after"]
    assert near["before"][:20] == near["after"][:20]
    assert [entry["documents"] for entry in report["outputs"]] == [
        sum(1 for _ in shard_lines(job.final_shard(task))) for task in job.tasks
    ]
    page = (job.output / "report.html").read_text(encoding="utf-8")
    assert "短。" in page
    # The folder can be the next tool's input as it is.
    assert len(expand_inputs([job.output])) == len(job.tasks)
    assert not (job.output / "quarantine.jsonl").exists()


def test_ranges_and_workers_write_the_same(
    corpus: Path, recipe: Path, tmp_path: Path, finished: dict[str, bytes]
) -> None:
    job = plan(corpus, tmp_path / "two", recipe)
    assert [task.name for task in job.tasks if task.file == 0][1] == "a-00001-of-00006"
    assert len(job.tasks) > 8
    run_local(job, workers=2)
    assert contents(job.output) == finished


@pytest.mark.parametrize("compression", ["none", "gz"])
def test_without_duplicates_shards_are_written_at_once(
    corpus: Path, recipe: Path, tmp_path: Path, compression: Any
) -> None:
    off = ("near_dedup=off", "exact_dedup=off")
    first = plan(corpus, tmp_path / "out", recipe, *off, compression=compression)
    run_local(first, workers=1)
    assert [record["id"] for record in written(first)] == [number for number in range(1_500) if number != 20]
    assert "dedup" not in read_report(first.output)
    time.sleep(1.1)  # gzip headers hold seconds
    second = plan(corpus, tmp_path / "again", recipe, *off, compression=compression)
    run_local(second, workers=1)
    assert contents(second.output) == contents(first.output)


def test_exact_deduplication_alone(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    job = plan(corpus, tmp_path / "out", recipe, "near_dedup=off")
    run_local(job, workers=1)
    report = read_report(job.output)
    assert report["written"]["documents"] == 1_497
    assert report["dedup"]["near"] is None or report["dedup"]["near"] == 0


def test_evaluation_text_is_left_out(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    question = json.loads(next(iter(shard_lines(_plain(corpus / "b.jsonl.gz", tmp_path)))))["content"][10:40]
    evaluation = tmp_path / "eval.jsonl"
    evaluation.write_text(json.dumps({"question": question}, ensure_ascii=False) + "\n", encoding="utf-8")
    job = plan(corpus, tmp_path / "out", recipe, f"decontamination.files=[{evaluation}]")
    run_local(job, workers=1)
    report = read_report(job.output)
    rule = report["rules"][-1]
    assert (rule["rule"], rule["dropped"], rule["reasons"]) == ("decontamination", 1, {"eval.jsonl": 1})
    assert 900 not in [record["id"] for record in written(job)]
    assert [(entry["name"], entry["texts"]) for entry in report["evaluation_sets"]] == [("eval.jsonl", 1)]


def _plain(path: Path, tmp_path: Path) -> Path:
    plain = tmp_path / "plain.jsonl"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    return plain


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(
    corpus: Path, recipe: Path, tmp_path: Path, finished: dict[str, bytes]
) -> None:
    output = tmp_path / "killed"
    arguments = command(corpus, output, recipe, "--range-size", "64K", "--workers", "2")
    done: dict[Path, int] = {}
    for stage in ("clean", "match", "write"):
        # A kill at once, and one after each stage has begun to finish tasks.
        run = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        workers = _wait_for(output / ".work" / stage, run)
        run.kill()
        run.wait()
        # Workers end with their parent, however it ends.
        assert not psutil.wait_procs(workers, timeout=10)[1]
        now = {path: path.stat().st_mtime_ns for path in output.glob(".work/*/*.done.json")}
        assert now, "the kill came too late or too early to prove anything"
        assert {path: now.get(path) for path in done} == done, "a task that was done has been done again"
        done = now
    assert not (output / "report.json").exists()
    # What a killed process had under its hands.
    (output / "a-00000-of-00006.jsonl.zst.123.tmp").write_bytes(b"half")
    assert subprocess.run(arguments, capture_output=True, check=True).returncode == 0
    assert contents(output) == finished


def _wait_for(folder: Path, run: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Wait until a stage has done a task; returns the workers."""
    end = time.monotonic() + 120
    while not list(folder.glob("*.done.json")):
        assert run.poll() is None, run.stderr and run.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.001)
    return psutil.Process(run.pid).children(recursive=True)


def test_a_task_that_raises_is_named(
    corpus: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(executors, "run_task", broken)
    job = plan(corpus, tmp_path / "out", recipe)
    with pytest.raises(TaskFailedError, match=r"a\.json: ZeroDivisionError: one two; start the same command again"):
        run_local(job, workers=1)


def test_a_worker_that_raises_is_named(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    job = plan(corpus, tmp_path / "out", recipe)
    (corpus / "a.json").unlink()
    with pytest.raises(UserError, match=r"a\.json: cannot be read: No such file"):
        run_local(job, workers=2)


class TwoArgumentsError(Exception):
    """Does not survive pickling as it is."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and\n{two}")


def broken_task(*_: object) -> None:
    raise TwoArgumentsError("this", "that")


def test_any_exception_of_a_worker_is_one_line_with_its_file(
    corpus: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = plan(corpus, tmp_path / "out", recipe)
    monkeypatch.setattr(executors, "run_task", broken_task)
    monkeypatch.setattr(executors, "_worker", (job, [0] * 99, [0] * 99))
    with pytest.raises(TaskFailedError) as caught:
        executors._work("clean", 0)
    received = pickle.loads(pickle.dumps(caught.value))
    message = str(executors._failure(job, "clean", 0, received))
    assert message.startswith(f"{corpus / 'a.json'} (part 1 of 6): TwoArgumentsError: this and that; start the same")


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_with_one_line(tmp_path: Path, recipe: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    line = orjson.dumps({"content": "今天天气很好，我们一起去公园散步。" * 40}) + b"\n"
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_bytes(line * 40_000)
    output = tmp_path / "out"
    run = subprocess.Popen(
        command(folder, output, recipe, "--workers", "2"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 120
    while len(list(output.glob(".work/clean/*.tmp"))) < 2:
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    victim = next(
        worker for worker in psutil.Process(run.pid).children() if any(".tmp" in f.path for f in worker.open_files())
    )
    victim.kill()
    out, err = run.communicate(timeout=60)
    assert run.returncode == 1, (out, err)
    assert err.startswith("error: a worker process was killed (out of memory?) while working on "), err
    assert err.count("\n") == 1
    assert "a.jsonl" in err or "b.jsonl" in err


def test_input_that_changes_under_the_job_is_an_error(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    job = plan(corpus, tmp_path / "out", recipe)
    with (corpus / "b.jsonl.gz").open("ab") as stream:
        stream.write(gzip.compress(b'{"content": "more"}\n'))
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: was changed since this job began; .*--overwrite"):
        run_local(job, workers=1)
    # What was half written goes at once, not at the next start: a full disk has no room for it.
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_what_a_kill_behind_the_report_left_goes(
    corpus: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(corpus, tmp_path / "out", recipe)[2:]
    assert main(arguments, "") == 0
    left = tmp_path / "out" / ".work" / "clean" / "a.jsonl.zst"
    left.parent.mkdir()
    left.write_bytes(b"large")
    assert main(arguments, "") == 0
    assert "finished before" in capsys.readouterr().out
    assert not left.parent.exists()


def test_two_runs_in_one_folder_are_refused(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    job = plan(corpus, tmp_path / "out", recipe)
    with executors.locked(job), pytest.raises(UserError, match="another process is working there"):
        run_local(job, workers=1)


def test_a_finished_or_other_job_in_the_folder(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    begun = plan(corpus, output, recipe)
    # Begun: the same job goes on, another recipe or input is refused by name.
    assert not create_job([corpus], output, begun.settings)[1]
    longer = Settings(str(recipe), ("length.least=30",), range_bytes=1 << 16)
    with pytest.raises(UserError, match=r"holds a job half done with other values of the recipe; .*--overwrite"):
        create_job([corpus], output, longer)
    run_local(begun, workers=1)
    before = contents(output)
    assert create_job([corpus], output, begun.settings)[1]
    shard = begun.final_shard(begun.tasks[1])
    shard.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=f"{shard.name}: is missing or was changed"):
        create_job([corpus], output, begun.settings)
    (tmp_path / "moved").rename(shard)
    with pytest.raises(UserError, match="holds a finished job with other values of the recipe"):
        create_job([corpus], output, longer)
    os.utime(corpus / "a.json", (1, 1))
    with pytest.raises(UserError, match="other values of the input files"):
        create_job([corpus], output, begun.settings)
    (output / "notes.md").write_text("mine", encoding="utf-8")
    job, finished = create_job([corpus], output, longer, overwrite=True)
    assert not finished
    assert set(contents(output)) == {"notes.md"}
    run_local(job, workers=1)
    assert contents(output).keys() == before.keys() | {"notes.md"}


def test_a_folder_with_other_files_is_left_alone(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds other files"):
        plan(corpus, output, recipe)
    assert os.listdir(output) == ["thesis.tex"]


def test_stages_without_tasks_are_left_out(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    job = plan(corpus, tmp_path / "out", recipe)
    assert [stage for stage in STAGES if job.stage_tasks(stage)] == list(STAGES)
    job = plan(corpus, tmp_path / "none", recipe, "near_dedup=off", "exact_dedup=off")
    assert [stage for stage in STAGES if job.stage_tasks(stage)] == ["scan", "clean", "report"]


def test_interrupted_workers_end(corpus: Path, recipe: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the run within seconds, with its workers."""
    output = tmp_path / "out"
    run = subprocess.Popen(
        command(corpus, output, recipe, "--workers", "2", "--range-size", "64K"),
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = _wait_for(output / ".work" / "clean", run)  # type: ignore[arg-type]
    with contextlib.suppress(ProcessLookupError):
        os.kill(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert err.strip().splitlines()[-1] == "interrupted"
    assert not psutil.wait_procs(workers, timeout=10)[1]
