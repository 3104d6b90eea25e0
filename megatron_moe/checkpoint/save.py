"""Writes a checkpoint through megatron-core's distributed checkpointing: whole or invisible."""

import queue
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_moe.checkpoint.layout import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    UNFINISHED,
    checkpoint_folder,
    prune,
    publish,
)
from megatron_moe.checkpoint.optimizer_state import METADATA, saved_state
from megatron_moe.checkpoint.state import Progress, current_layout, model_state, rng_state
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import save_run
from megatron_moe.data.tokenizer.load import Tokenizer
from megatron_moe.runtime import replace
from megatron_moe.runtime.replace import Replacement


def results_queue(mp_mode: str = "spawn") -> "queue.Queue[Any]":
    """Where the writer leaves its results for this process itself: saves are synchronous, and write with threads."""
    return queue.Queue()


REPLACEMENT = Replacement(
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "get_write_results_queue",
    results_queue,
    "it starts a server process beside each rank, half a gigabyte that outlives a killed rank",
)


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
    """
    assert run.checkpoint.save is not None
    folder = checkpoint_folder(run.checkpoint.save, progress.step)
    unfinished = folder.with_name(folder.name + UNFINISHED)
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
    replace.apply([REPLACEMENT])
    dist_checkpointing.save(state, str(unfinished), content_metadata=METADATA)
    if main:
        save_run(run, unfinished / CONFIG_FILE)
        tokenizer.save_to(unfinished / TOKENIZER_FOLDER)
        publish(unfinished, progress.step)
        if run.checkpoint.keep_last is not None:
            prune(run.checkpoint.save, run.checkpoint.keep_last)
    dist.barrier()
    return folder
