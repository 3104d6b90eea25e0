"""Sampling many files, by several processes where there are several files; the sample is the same for any number."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.sample import Sample, SampleOptions, SmallestKeys, read_sample

# Starting a process costs as much as reading so much text.
_WORTH_A_PROCESS = 32 << 20
# Files under way per process: each may hold a part of the sample.
_AHEAD = 2


def read_all(files: Sequence[Path], options: SampleOptions, workers: int, progress: Callable[[int], object]) -> Sample:
    """Sample files.

    Args:
        files: what to read, in the order that places sentences.
        options: what to keep.
        workers: processes at most; a process reads whole files.
        progress: told how many more bytes were read.

    Raises:
        UserError: a file cannot be read, or a process died.
    """
    whole = Sample(kept=SmallestKeys(options.sentences))
    total = sum(path.stat().st_size for path in files)
    workers = min(workers, len(files), max(1, total // _WORTH_A_PROCESS))
    if workers == 1:
        for number, path in enumerate(files):
            whole.merge(read_sample(path, number, options, whole.kept.limit, progress))
        return whole
    context = multiprocessing.get_context("spawn")
    under_way: deque[tuple[Path, Future[Sample]]] = deque()
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            try:
                for number, path in enumerate(files):
                    if len(under_way) >= workers * _AHEAD:
                        _take(under_way, whole, progress)
                    under_way.append((path, pool.submit(read_sample, path, number, options, whole.kept.limit)))
                while under_way:
                    _take(under_way, whole, progress)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool as error:
        raise UserError(
            "--workers: a process that read was killed, perhaps for want of memory; give fewer --workers or "
            "--input-sentences"
        ) from error
    return whole


def _take(under_way: deque[tuple[Path, "Future[Sample]"]], whole: Sample, progress: Callable[[int], object]) -> None:
    path, future = under_way.popleft()
    whole.merge(future.result())
    progress(path.stat().st_size)
