"""Run the stages of a job on this machine: processes, a progress bar, and no failure that goes unnoticed."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_moe.config.base import UserError
from megatron_moe.data.command_line import byte_progress
from megatron_moe.data.files import locked_file
from megatron_moe.data.pool import end_with_parent
from megatron_moe.data.wudao.job import STAGES, Job, StageName, load_job
from megatron_moe.data.wudao.stages import run_task, task_bytes
from megatron_moe.data.wudao.tasks import PAGE, QUARANTINE, REPORT, TIMINGS

_POLL_SECONDS = 0.2
# State of a task in the shared table, beside its bytes.
_WAITING, _RUNNING = 0, 1


class TaskFailedError(Exception):
    """A task raised something that is not the user's mistake, or its process died; the message is one line."""


def task_label(job: Job, stage: StageName, number: int) -> str:
    """How errors name a task: by the file that it works on, where it is one."""
    if stage == "scan":
        return job.inputs[job.scanned_files[number]].shown
    if stage in ("clean", "write"):
        task = job.tasks[number]
        shown = job.inputs[task.file].shown
        return f"{shown} (part {task.part + 1} of {task.parts})" if task.parts > 1 else shown
    return f"stage {stage}, task {number}"


def run_local(job: Job, workers: int, progress: bool | None = None) -> None:
    """Do all that is left of a job.

    Args:
        job: a job that is saved.
        workers: processes; 1 works in this one.
        progress: show bars on standard error; None: if it is a terminal.

    Raises:
        UserError: something the user can mend.
        TaskFailedError: anything else that ended a task; what is done stays done.
    """
    with locked(job), no_leftovers(job):
        # Without this, tqdm's monitor thread would be alive when processes start.
        tqdm.monitor_interval = 0
        stages = [stage for stage in STAGES if job.stage_tasks(stage)]
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(_Pool(job, workers)) if workers > 1 else None
            for place, stage in enumerate(stages, 1):
                left = [number for number in range(job.stage_tasks(stage)) if not job.is_done(stage, number)]
                if not left:
                    continue
                sizes = {number: task_bytes(job, stage, number) for number in left}
                with byte_progress(sum(sizes.values()), f"[{place}/{len(stages)}] {stage}", progress) as bar:
                    if pool is None or len(left) == 1:
                        _run_here(job, stage, sizes, bar)
                    else:
                        pool.run(stage, sizes, bar)


@contextmanager
def locked(job: Job) -> Iterator[None]:
    """Keep a second process from working in the same folder; the lock ends with the process, however it ends."""
    with locked_file(
        job.work / "lock", f"{job.where}: another process is working there; wait until it ends", job.where
    ):
        yield


@contextmanager
def no_leftovers(job: Job) -> Iterator[None]:
    """Remove half-written files at the beginning and, as a full disk may have ended the run, at the end."""
    _remove_leftovers(job)
    try:
        yield
    finally:
        _remove_leftovers(job)


def _remove_leftovers(job: Job) -> None:
    """What killed processes left half written: nothing else writes here while the lock is held."""
    names = {REPORT, PAGE, TIMINGS, QUARANTINE, *(job.final_shard(task).name for task in job.tasks)}
    for path in [*job.output.glob("*.tmp"), *job.work.glob("*/*.tmp"), *job.work.glob("*.tmp")]:
        # NAME.PID.tmp
        if path.parent != job.output or path.name.rsplit(".", 2)[0] in names:
            path.unlink(missing_ok=True)


def _run_here(job: Job, stage: StageName, sizes: dict[int, int], bar: Any) -> None:
    finished = 0
    for number, size in sizes.items():

        def show(done: int, base: int = finished, size: int = size) -> None:
            bar.update(base + min(done, size) - bar.n)

        try:
            run_task(job, stage, number, show)
        except UserError:
            raise
        except Exception as error:
            raise _failure(job, stage, number, error) from error
        finished += size
        bar.update(finished - bar.n)


def _failure(job: Job, stage: StageName, number: int, error: BaseException) -> TaskFailedError:
    what = str(error) if isinstance(error, TaskFailedError) else _one_line(error)
    return TaskFailedError(
        f"{task_label(job, stage, number)}: {what}; start the same command again to go on from there"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class _Pool:
    """Worker processes that live over all stages.

    Each task has a place in two shared tables, so that progress and the process of a task are known without locks,
    which a killed process would hold forever.
    """

    def __init__(self, job: Job, workers: int) -> None:
        self._job = job
        # spawn: a fork of a process with threads may hang.
        context: SpawnContext = multiprocessing.get_context("spawn")
        self._slots = max(job.stage_tasks(stage) for stage in STAGES)
        self._bytes = context.RawArray("q", self._slots)
        self._processes = context.RawArray("q", self._slots)
        initial = (str(job.output), self._bytes, self._processes)
        self._pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=initial)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            # What is under way would be thrown away: after an error or Ctrl-C nobody waits minutes for it.
            for process in {process for process in self._processes if process}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGTERM)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, stage: StageName, sizes: dict[int, int], bar: Any) -> None:
        """Do tasks of one stage; returns when all are done."""
        for slot in range(self._slots):
            self._bytes[slot] = self._processes[slot] = 0
        # The largest first, so that none of them is begun last.
        order = sorted(sizes, key=lambda number: (-sizes[number], number))
        pending: dict[Future[None], int] = {}
        try:
            pending = {self._pool.submit(_work, stage, number): number for number in order}
            while pending:
                done, _ = wait(pending, _POLL_SECONDS, FIRST_COMPLETED)
                for future in done:
                    number = pending.pop(future)
                    self._check(future, stage, number)
                    self._bytes[number] = sizes[number]
                bar.update(sum(min(self._bytes[number], size) for number, size in sizes.items()) - bar.n)
        except BrokenProcessPool as error:
            raise self._died(stage) from error

    def _check(self, future: Future[None], stage: StageName, number: int) -> None:
        try:
            future.result()
        except (UserError, BrokenProcessPool):
            raise
        except Exception as error:
            raise _failure(self._job, stage, number, error) from error

    def _died(self, stage: StageName) -> TaskFailedError:
        """All of a broken pool's futures fail alike: the table says what was being done."""
        count = self._job.stage_tasks(stage)
        running = [
            number for number in range(count) if self._processes[number] and not self._job.is_done(stage, number)
        ]
        files = ", ".join(task_label(self._job, stage, number) for number in running) or f"stage {stage}"
        return TaskFailedError(
            f"a worker process was killed (out of memory?) while working on {files}; "
            "start the same command again to go on from there, with fewer --workers if memory was short"
        )


# A worker's job, and the shared tables of `_Pool`; it has no other state.
_worker: tuple[Job, Any, Any] | None = None


def _start_worker(output: str, done_bytes: Any, processes: Any) -> None:
    global _worker
    # Ctrl-C reaches the whole process group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    _worker = (load_job(Path(output)), done_bytes, processes)


def _work(stage: StageName, number: int) -> None:
    if _worker is None:
        raise RuntimeError("the worker was not started by _start_worker")
    job, done_bytes, processes = _worker
    processes[number] = os.getpid()

    def show(done: int) -> None:
        done_bytes[number] = done

    try:
        run_task(job, stage, number, show)
    except UserError:
        raise
    except Exception as error:
        # Exceptions with several arguments may not survive the way to the parent; the traceback comes along (--debug).
        raise TaskFailedError(_one_line(error)) from error
    finally:
        processes[number] = 0
