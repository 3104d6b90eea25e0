"""The stages of a job, each of them tasks that run in any order on any machine that sees the folders.

scan (where large arrays can be cut) -> clean -> match (equal and similar documents) -> decide -> write -> report
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_moe.data.dedup import EXACT, decide, drop_path, match_band, match_exact, read_drops
from megatron_moe.data.wudao.clean import Progress, clean_task, signature_file, tally_file
from megatron_moe.data.wudao.job import Job, StageName
from megatron_moe.data.wudao.reader import cut_objects
from megatron_moe.data.wudao.report import write_report
from megatron_moe.data.wudao.shards import shard_lines, shard_writer, shown
from megatron_moe.data.wudao.stats import Samples, Tally, place_hash

_LINES_AT_ONCE = 256


def run_task(job: Job, stage: StageName, number: int, progress: Progress) -> None:
    """Do one task of a stage, unless it has been done.

    Args:
        job: the job.
        stage, number: which task.
        progress: told how much of `task_bytes` is done.
    """
    if job.is_done(stage, number):
        return
    seconds, processor = time.monotonic(), time.process_time()
    result = _TASKS[stage](job, number, progress)
    timings = {"seconds": time.monotonic() - seconds, "processor_seconds": time.process_time() - processor}
    job.finish_task(stage, number, {**result, **timings})
    if stage == "report":
        tidy(job)


def task_bytes(job: Job, stage: StageName, number: int) -> int:
    """How much a task has to read, for progress: bytes on disk."""
    if stage == "scan":
        return job.inputs[job.scanned_files[number]].size
    if stage == "clean":
        return job.tasks[number].size
    if stage == "write":
        return _size(job.cleaned_shard(job.tasks[number]))
    if stage == "match":
        return sum(_size(path) for path in _signature_files(job)) // job.stage_tasks("match")
    return 1


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _signature_files(job: Job) -> list[Path]:
    return [signature_file(job, task) for task in job.tasks]


def _scan(job: Job, number: int, progress: Progress) -> dict[str, Any]:
    file = job.inputs[job.scanned_files[number]]
    task = next(task for task in job.tasks if task.file == job.scanned_files[number])
    return {"cuts": cut_objects(task.source, file.size, task.parts, job.settings.reading, progress)}


def _match(job: Job, number: int, progress: Progress) -> dict[str, Any]:
    """Task 0 compares whole texts; task n the band n - 1."""
    files, output = _signature_files(job), _pair_file(job, number)
    if number == 0:
        match_exact(files, job.near, output)
    elif job.near:
        match_band(files, number - 1, job.near, output)
    return {}


def _pair_file(job: Job, number: int) -> Path:
    return job.scratch("match", f"{number:06d}.pairs")


def _decide(job: Job, number: int, progress: Progress) -> dict[str, Any]:
    pairs = [_pair_file(job, task) for task in range(job.stage_tasks("match"))]
    folder = job.work / "decide"
    folder.mkdir(parents=True, exist_ok=True)
    return {"dedup": decide(pairs, _signature_files(job), job.near, folder).as_dict()}


def _write(job: Job, number: int, progress: Progress) -> dict[str, Any]:
    """Copy a cleaned shard without the lines that deduplication drops."""
    task = job.tasks[number]
    drops = read_drops(drop_path(job.work / "decide", signature_file(job, task)))
    tally = Tally(job.result("clean", number)["types"], np.load(tally_file(job, task)))
    doomed = dict(zip(drops.rows.tolist(), zip(drops.kept.tolist(), drops.reasons.tolist(), strict=True), strict=True))
    samples = {"exact": Samples(), "near": Samples()}
    done = 0
    with shard_writer(job.final_shard(task), job.where) as write:
        waiting: list[bytes] = []
        for row, line in enumerate(shard_lines(job.cleaned_shard(task))):
            if row in doomed:
                kept, reason = doomed[row]
                _sample_drop(samples["exact" if reason == EXACT else "near"], line, number, row, kept)
                continue
            waiting.append(line)
            if len(waiting) == _LINES_AT_ONCE:
                done += write_all(write, waiting)
                progress(done)
        write_all(write, waiting)
    return {
        "dropped": tally.amount(drops.rows).as_dict(),
        "samples": {kind: found.entries() for kind, found in samples.items()},
    }


def write_all(write: Callable[[bytes], object], lines: list[bytes]) -> int:
    """Write lines and forget them; returns how many bytes they had."""
    joined = b"".join(lines)
    write(joined)
    lines.clear()
    return len(joined)


def _sample_drop(samples: Samples, line: bytes, shard: int, row: int, kept: int) -> None:
    key = place_hash(shard << 32, row)
    if samples.wants(key):
        samples.add(key, {"dropped": [shard, row], "kept": [kept >> 32, kept & 0xFFFFFFFF], "before": shown(line)})


def _report(job: Job, number: int, progress: Progress) -> dict[str, Any]:
    write_report(job)
    return {}


def tidy(job: Job) -> None:
    """Delete what only this job's later stages needed; logs of schedulers stay."""
    for stage in ("scan", "clean", "match", "decide", "write", "report"):
        shutil.rmtree(job.work / stage, ignore_errors=True)


_TASKS = {"scan": _scan, "clean": clean_task, "match": _match, "decide": _decide, "write": _write, "report": _report}
