"""Sampling many files, by several processes where there are several files; the sample is the same for any number."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_moe.data.pool import run_tasks
from megatron_moe.data.tokenizer.sample import Sample, SampleOptions, SmallestKeys, read_sample

# Starting a process costs as much as reading so much text.
_WORTH_A_PROCESS = 32 << 20
# A file, its place among all, and the largest key of a sentence that is still wanted.
_Task = tuple[Path, int, np.uint64]


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
    # Made one by one: the more is read, the fewer sentences the next process needs to keep.
    tasks = ((path, number, whole.kept.limit) for number, path in enumerate(files))
    for (path, _, _), sample in run_tasks(
        _reader, (options,), tasks, workers, "give fewer --workers or --input-sentences"
    ):
        whole.merge(sample)
        progress(path.stat().st_size)
    return whole


def _reader(options: SampleOptions) -> Callable[[_Task], Sample]:
    """What a worker process does: sample a file."""

    def read(task: _Task) -> Sample:
        path, number, limit = task
        return read_sample(path, number, options, limit)

    return read
