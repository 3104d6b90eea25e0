"""Worker processes: results as they come, and every way a worker can fail is one line."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_moe.config.base import UserError
from megatron_moe.data.pool import run_tasks

ROOT = Path(__file__).parents[2]


def make(offset: int) -> Callable[[int | str], int]:
    def work(task: int | str) -> int:
        match task:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "raise":
                raise MemoryError("no more")
            case "refuse":
                raise UserError("a.jsonl line 3: bad")
            case "sleep":
                time.sleep(0.5)
        return offset + int(task) if isinstance(task, int) else os.getpid()

    return work


def test_every_task_once() -> None:
    assert sorted(run_tasks(make, (100,), range(20), 2)) == [(task, 100 + task) for task in range(20)]
    assert list(run_tasks(make, (100,), range(3), 1)) == [(0, 100), (1, 101), (2, 102)]
    assert list(run_tasks(make, (0,), [], 2)) == []


def test_one_task_needs_no_process() -> None:
    assert list(run_tasks(make, (0,), ["x"], 4)) == [("x", os.getpid())]


def test_workers_end_with_a_parent_that_is_killed() -> None:
    program = (
        "from megatron_moe.data.pool import run_tasks\n"
        "from tests.data.test_pool import make\n"
        "for _ in run_tasks(make, (0,), iter(lambda: 'sleep', None), 2): print(flush=True)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == b"\n"
        workers = psutil.Process(parent.pid).children()
        assert len(workers) >= 2
        parent.kill()
        parent.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("die", "^a worker process died"),
        ("raise", "^a worker process failed: MemoryError: no more$"),
        ("refuse", r"^a\.jsonl line 3: bad$"),
    ],
)
def test_a_failing_worker_ends_it(task: str, message: str) -> None:
    asked = []

    def tasks() -> Iterator[int | str]:
        for number in range(10_000):
            asked.append(number)
            yield task if number == 3 else number

    with pytest.raises(UserError, match=message):
        list(run_tasks(make, (0,), tasks(), 2))
    # Tasks are asked for as they are begun, and none after the error.
    assert len(asked) < 100


def test_preloaded_workers_are_copies_of_one_process() -> None:
    tasks = range(20)
    spawned = {parent for _, parent in run_tasks(make_parent_asker, (), tasks, workers=2)}
    assert spawned == {os.getpid()}
    (server,) = {parent for _, parent in run_tasks(make_parent_asker, (), tasks, workers=2, preload=("json",))}
    assert server != os.getpid()


def make_parent_asker() -> Callable[[int], int]:
    """A worker that tells which process it was made by."""
    return lambda _: os.getppid()
