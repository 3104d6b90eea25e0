"""Worker processes that cannot hang: their death and their errors end the run, and they end with it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait as wait_for_handles
from typing import Any

from megatron_moe.config.base import Resumable, UserError

# Pieces handed out per process: the next one is there when one is finished.
_AHEAD = 2


def run_tasks[T, R](
    make_worker: Callable[..., Callable[[T], R]],
    arguments: tuple[Any, ...],
    tasks: Iterable[T],
    workers: int,
    advice: str = "start again to go on from the finished parts, with fewer --workers if memory was short",
    preload: Sequence[str] = (),
) -> Generator[tuple[T, R]]:
    """Work tasks off, in the order in which they finish; the tasks are asked for only as far as they can be begun.

    Args:
        make_worker: called with `arguments` once in every process; what it returns does a task.
        arguments: can be pickled.
        tasks: can be pickled. One alone is done in this process.
        workers: processes.
        advice: what the user can do when a process has died.
        preload: modules that are imported once, in a process of which the workers are copies: torch takes a third of a
            gigabyte in each process that imports it itself. They must start no threads.

    Raises:
        UserError: a worker's own, or a line that says what else a worker raised, or that one died.
    """
    stream = iter(tasks)
    first = list(islice(stream, 2))
    if workers == 1 or len(first) < 2:
        worker = make_worker(*arguments)
        for task in chain(first, stream):
            yield task, worker(task)
        return
    # A fork of this process, which may have threads, may hang.
    context = multiprocessing.get_context("forkserver" if preload else "spawn")
    if preload:
        context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(make_worker, arguments)) as pool:
        pending: dict[Future[R], T] = {}
        try:
            yield from _run(pool, pending, chain(first, stream), workers)
        except BrokenProcessPool as error:
            raise Resumable(f"a worker process died (out of memory, or killed); {advice}") from error
        finally:
            # After an error the queued tasks must not be worked through first.
            pool.shutdown(wait=True, cancel_futures=True)


def _run[T, R](
    pool: ProcessPoolExecutor, pending: dict[Future[R], T], tasks: Iterator[T], workers: int
) -> Iterator[tuple[T, R]]:
    exhausted = False
    while True:
        while not exhausted and len(pending) < _AHEAD * workers:
            task = next(tasks, None)
            if task is None:
                exhausted = True
                break
            pending[pool.submit(_work, task)] = task
        if not pending:
            return
        finished, _ = wait(pending, return_when=FIRST_COMPLETED)
        for future in finished:
            done = pending.pop(future)
            yield done, future.result()


# What a worker process does; it has no other state.
_worker: Callable[[Any], Any] | None = None


def _start(make_worker: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _worker
    # Ctrl-C reaches all processes of a terminal; the parent alone decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism: without this a Hugging Face tokenizer would start a thread a core in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()
    _worker = make_worker(*arguments)


def end_with_parent() -> None:
    """End this worker process when its parent ends, however that ends.

    Otherwise it would wait for tasks for ever: it holds the writing end of that pipe itself.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_handles([parent.sentinel])
        os._exit(1)


def _work(task: Any) -> Any:
    if _worker is None:
        raise RuntimeError("the worker was not started by _start")
    try:
        return _worker(task)
    except UserError:
        raise
    except Exception as error:
        # Otherwise the user would see a traceback of two processes.
        raise Resumable(f"a worker process failed: {type(error).__name__}: {error}") from error
