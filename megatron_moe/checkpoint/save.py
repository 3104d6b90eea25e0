"""Writes a checkpoint through megatron-core's distributed checkpointing: whole or invisible."""

import functools
import logging
import os
import queue
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _write_item

from megatron_moe.checkpoint.layout import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    UNFINISHED,
    checkpoint_folder,
    latest_iteration,
    prune,
    publish,
)
from megatron_moe.checkpoint.optimizer_state import METADATA, saved_state
from megatron_moe.checkpoint.state import Progress, current_layout, model_state, rng_state
from megatron_moe.config.base import DISK_FULL, UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import save_run
from megatron_moe.data.tokenizer.load import Tokenizer
from megatron_moe.runtime import replace
from megatron_moe.runtime.launch import AnotherRankFailed, lost_connection
from megatron_moe.runtime.replace import Replacement

_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
_FULL = {os.strerror(number) for number in DISK_FULL}
_ERRNO = re.compile(r"\[Errno \d+\] ([^:\n]+)")


def results_queue(mp_mode: str = "spawn") -> "queue.Queue[Any]":
    """Where the writer leaves its results for this process itself: saves are synchronous, and write with threads."""
    return queue.Queue()


@functools.wraps(_write_item)
def write_item(*args: Any, **kwargs: Any) -> Any:
    """torch's own, but what the disk says is not lost: torch.save turns it into a file of unexpected length."""
    try:
        return _write_item(*args, **kwargs)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


REPLACEMENTS = [
    Replacement(
        _WRITER,
        "get_write_results_queue",
        results_queue,
        "it starts a server process beside each rank, half a gigabyte that outlives a killed rank",
    ),
    Replacement(_WRITER, "_write_item", write_item, "it does not say why a file cannot be written, as on a full disk"),
]


def save_checkpoint(
    run: RunConfig,
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    progress: Progress,
    tokenizer: Tokenizer,
) -> Path:
    """Save everything a run needs to go on; every rank calls it.

    Ranks write into a folder with a temporary name; rank 0 renames it once all have finished, so a checkpoint is
    never seen half-written. Older ones go when --keep-last says so.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: this rank cannot write its part. What was saved before stays.
        AnotherRankFailed: another one cannot.
    """
    assert run.checkpoint.save is not None
    folder = checkpoint_folder(run.checkpoint.save, progress.step)
    unfinished = folder.with_name(folder.name + UNFINISHED)
    with _writer_errors() as logged:
        try:
            _write(run, model, optimizer, scheduler, progress, tokenizer, unfinished)
        except (Exception, CheckpointException) as error:
            if lost_connection(error):
                raise
            if dist.get_rank() == 0:
                # On a full disk the room is needed, and a whole checkpoint is never under this name.
                shutil.rmtree(unfinished, ignore_errors=True)
            if problem := _storage_problem(error, logged):
                raise UserError(_not_saved(run.checkpoint.save, progress.step, problem)) from error
            if isinstance(error, CheckpointException) and dist.get_rank() not in error.failures:
                # Only the coordinator is told which one.
                which = ", ".join(map(str, error.failures)) or "unknown"
                raise AnotherRankFailed(f"another rank could not save its part: {which}") from error
            raise
    return folder


def _write(
    run: RunConfig,
    model: list[Any],
    optimizer: Any,
    scheduler: Any,
    progress: Progress,
    tokenizer: Tokenizer,
    unfinished: Path,
) -> None:
    assert run.checkpoint.save is not None
    main = dist.get_rank() == 0
    if main:
        # What a killed save left behind.
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    sharded_model = model_state(model)
    progress.layout = current_layout()
    state = {
        **sharded_model,
        **saved_state(sharded_model, optimizer),
        "scheduler": scheduler.state_dict(),
        "progress": asdict(progress),
        "rng_state": rng_state(),
    }
    replace.apply(REPLACEMENTS)
    dist_checkpointing.save(state, str(unfinished), content_metadata=METADATA)
    if main:
        save_run(run, unfinished / CONFIG_FILE)
        tokenizer.save_to(unfinished / TOKENIZER_FOLDER)
        publish(unfinished, progress.step)
        if run.checkpoint.keep_last is not None:
            prune(run.checkpoint.save, run.checkpoint.keep_last)
    dist.barrier()


@contextmanager
def _writer_errors() -> Iterator[list[str]]:
    """What megatron-core's writer threads log as errors, collected: the exceptions that reach us do not say it."""
    logger, messages = logging.getLogger(_WRITER), list[str]()
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def _storage_problem(error: BaseException, logged: list[str]) -> str | None:
    """What the operating system said of this rank's files, if that is what failed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__
    found = _ERRNO.search("\n".join(logged))
    return found[1].strip() if found else None


def _not_saved(save: str, step: int, problem: str) -> str:
    cure = "make room" if problem in _FULL else "mend that"
    before = latest_iteration(save)
    kept = "" if before is None else f" (that of step {before} is kept)"
    again = "start again" if before is None else f"go on with --load {save}"
    return f"--save {save}: the checkpoint of step {step} cannot be written{kept}: {problem}; {cure}, then {again}"
