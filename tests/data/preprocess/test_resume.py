"""Runs that are killed, with real processes and SIGKILL: nothing half-written, done twice or left over."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.preprocess import Preprocessing, assemble, preprocess, tasks
from megatron_moe.data.preprocess.workspace import open_workspace
from tests.data.chinese_text import documents, write_jsonl
from tests.data.preprocess.helpers import same_pair, write_records

ROOT = Path(__file__).parents[3]
# The tool with pieces small enough for a test to have many of them.
TOOL = """
import sys
from megatron_moe.data.preprocess import tasks
tasks._SMALL_PIECE = 3000
sys.path.insert(0, "tools")
from preprocess_data import main
from megatron_moe.data.command_line import run_tool
run_tool(main)
"""
DEADLINE = 60


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TOOL, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def workers_of(parent: int) -> list[int]:
    """Its children that are workers, from /proc; multiprocessing has another one, which keeps count of semaphores."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
            command = (entry.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and b"spawn_main" in command:
            found.append(int(entry.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    texts = documents(1500)
    records = [{"text": text} for text in documents(800, 1)]
    return [write_jsonl(tmp_path / "a.jsonl", texts), write_records(tmp_path / "b.jsonl.zst", records)]


def arguments(inputs: list[Path], prefix: Path, model: Path) -> list[object]:
    return ["--input", *inputs, "--output-prefix", prefix, "--tokenizer-model", model, "--workers", 2]


def test_a_killed_run_goes_on(tmp_path: Path, inputs: list[Path], tokenizer_model: Path) -> None:
    job = Preprocessing(data=DataConfig(tokenizer_model=str(tokenizer_model)))
    preprocess(inputs, tmp_path / "whole", job)
    parts = tmp_path / "out.parts"
    words = arguments(inputs, tmp_path / "out", tokenizer_model)
    done = 0
    for _ in range(2):
        process = start(*words)
        before = done
        wait_until(lambda before=before: len(list(parts.glob("*.done"))) > before + 5)
        workers = workers_of(process.pid)
        process.kill()
        process.wait()
        # A worker that lives on would write into what the next run is doing.
        try:
            wait_until(lambda workers=workers: not any(map(alive, workers)))
        finally:
            kill(workers)
        done = len(list(parts.glob("*.done")))
        assert done > before + 5
        assert not list(tmp_path.glob("out.*[nx]"))
    process = start(*words)
    output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    resumed, total = map(int, re.search(r"went on from ([\d]+) of ([\d]+) parts", output).groups())  # type: ignore[union-attr]
    assert done <= resumed < total
    assert same_pair(tmp_path / "out", tmp_path / "whole")
    # The report too, but for the names in it.
    reports = [json.loads((tmp_path / f"{name}.report.json").read_bytes()) for name in ("out", "whole")]
    assert reports[0]["totals"] == reports[1]["totals"]
    assert not parts.exists()


def test_a_killed_worker_ends_the_run_with_one_line(tmp_path: Path, inputs: list[Path], tokenizer_model: Path) -> None:
    process = start(*arguments(inputs, tmp_path / "out", tokenizer_model))
    wait_until(lambda: any((tmp_path / "out.parts").glob("*.done")))
    workers = workers_of(process.pid)
    assert workers
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 2
    assert errors.startswith("error: a worker process died (out of memory, or killed); start again to go on")
    assert errors.count("\n") == 1
    wait_until(lambda: not any(map(alive, workers)))


@pytest.fixture
def stopped(tmp_path: Path, tokenizer_model: Path, monkeypatch: pytest.MonkeyPatch) -> Preprocessing:
    """A run that a bad line stopped after all pieces of the first file; the line is good now."""
    monkeypatch.setattr(tasks, "_SMALL_PIECE", 3000)
    job = Preprocessing(data=DataConfig(tokenizer_model=str(tokenizer_model)))
    write_jsonl(tmp_path / "a.jsonl", documents(50))
    (tmp_path / "b.jsonl").write_text("bad\n")
    with pytest.raises(UserError, match=r"b\.jsonl line 1: not JSON"):
        preprocess([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", job)
    write_jsonl(tmp_path / "b.jsonl", ["好"])
    return job


def again(folder: Path, job: Preprocessing) -> int:
    return preprocess([folder / "a.jsonl", folder / "b.jsonl"], folder / "out", job).resumed


def test_only_what_changed_is_done_again(tmp_path: Path, stopped: Preprocessing) -> None:
    parts = len(list((tmp_path / "out.parts").glob("*.done")))
    assert parts > 3
    assert again(tmp_path, stopped) == parts
    preprocess([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "whole", stopped)
    assert same_pair(tmp_path / "out", tmp_path / "whole")


def test_a_file_written_again_is_read_again(tmp_path: Path, stopped: Preprocessing) -> None:
    source = tmp_path / "a.jsonl"
    text = source.read_text(encoding="utf-8")
    source.write_text(text.replace("北京", "上海"), encoding="utf-8")
    assert source.stat().st_size == len(text.encode())
    assert again(tmp_path, stopped) == 0
    preprocess([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "whole", stopped)
    assert same_pair(tmp_path / "out", tmp_path / "whole")


def test_parts_of_other_options_are_not_mixed_in(tmp_path: Path, stopped: Preprocessing) -> None:
    with pytest.raises(UserError, match=r"out\.parts: holds the unfinished work of another command \(append_eod: True"):
        again(tmp_path, dataclasses.replace(stopped, append_eod=False))
    assert again(tmp_path, stopped) > 3


@pytest.mark.parametrize("column", ["bin", "lengths"])
@pytest.mark.parametrize("how", ["one more", "one less", "cut", "gone"])
def test_a_damaged_part_is_seen(tmp_path: Path, stopped: Preprocessing, column: str, how: str) -> None:
    # A piece can be empty: one in which no line begins. The names differ from run to run.
    part = max((tmp_path / "out.parts").glob(f"*.{column}"), key=lambda path: path.stat().st_size)
    content = bytearray(part.read_bytes())
    content[-4] = (content[-4] + {"one more": 1, "one less": -1}.get(how, 0)) % 256
    part.write_bytes(content[:-4] if how == "cut" else content)
    if how == "gone":
        part.unlink()
    with pytest.raises(
        UserError, match=rf"{part.name}: (damaged|cannot be read).*; delete .*out\.parts and start again"
    ):
        again(tmp_path, stopped)
    assert not list(tmp_path.glob("out.[bi]*"))


def test_a_marker_that_cannot_be_read_is_none(tmp_path: Path, stopped: Preprocessing) -> None:
    first, *others = (tmp_path / "out.parts").glob("*.done")
    first.write_bytes(b"")
    assert again(tmp_path, stopped) == len(others)


def test_a_run_stopped_while_it_puts_parts_together(
    tmp_path: Path, stopped: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.bin").write_bytes(b"earlier")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assemble._Source, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            again(tmp_path, stopped)
    assert (tmp_path / "out.bin").read_bytes() == b"earlier"
    # What a kill would have left.
    (tmp_path / "out.parts" / "out.bin.1.tmp").write_bytes(b"half")
    assert again(tmp_path, stopped) > 3
    assert not (tmp_path / "out.parts").exists()


def test_two_runs_do_not_write_one_pair(tmp_path: Path, stopped: Preprocessing) -> None:
    options = {"merge": ["a"]}
    with (
        open_workspace(tmp_path / "other", options, "other.bin"),
        pytest.raises(UserError, match=r"other\.parts: another run is writing .*other"),
        open_workspace(tmp_path / "other", options, "other.bin"),
    ):
        pass


def test_an_input_that_changes_meanwhile(
    tmp_path: Path, stopped: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tasks.Plan.ended

    def ended(plan: tasks.Plan, task: tasks.Task) -> None:
        write_jsonl(tmp_path / "a.jsonl", documents(60))
        real(plan, task)

    monkeypatch.setattr(tasks.Plan, "ended", ended)
    write_records(tmp_path / "b.jsonl.gz", [{"text": "好"}])
    with pytest.raises(UserError, match=r"--input .*a\.jsonl: was changed while it was read"):
        preprocess([tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"], tmp_path / "out", stopped)
