"""Megatron-LM's checkpoints of a stock `GPTModel` of megatron-core 0.5 and later, and of its GPT before.

    latest_checkpointed_iteration.txt
    iter_0005000/.metadata, __0_0.distcp, ...        distributed (--ckpt-format torch_dist)
    iter_0005000/common.pt                           the run's arguments; since 0.17 an object in the .distcp files
    iter_0005000/mp_rank_00/model_optim_rng.pt       by ranks (--ckpt-format torch): `megatron_ranks.py`

Optimizer, generators and the state of FP8 scales are left out.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.convert.coverage import check_side
from megatron_moe.checkpoint.convert.ours_reader import OursSource
from megatron_moe.checkpoint.foreign.megatron_args import check_given, megatron_notes, megatron_sections
from megatron_moe.checkpoint.foreign.megatron_map import LEFT_OUT, WORDS, check_complete, check_model, megatron_blocks
from megatron_moe.checkpoint.foreign.megatron_ranks import has_ranks, open_ranks
from megatron_moe.checkpoint.foreign.model import ForeignModel, Selected, compact, merged, of_training
from megatron_moe.checkpoint.foreign.settings import Settings
from megatron_moe.checkpoint.foreign.torch_file import read_torch_file
from megatron_moe.checkpoint.torch_metadata import FILE as INDEX
from megatron_moe.checkpoint.torch_metadata import read_metadata
from megatron_moe.config.base import UserError
from megatron_moe.config.yaml_io import Values, build_run

LATEST = "latest_checkpointed_iteration.txt"
COMMON_FILE = "common.pt"
_COMMON = "common_state/shard_0_1"


def open_megatron(folder: Path, flags: Values | None = None) -> ForeignModel:
    """A distributed checkpoint of Megatron-LM's.

    Args:
        folder: the one that holds the file with the latest iteration, or one of its `iter_` folders.
        flags: sections of a run that go over what the checkpoint's arguments say, or stand for them.

    Raises:
        UserError: a file is missing or damaged, or the model is one that ours cannot be.
    """
    folder = _step_folder(folder)
    if has_ranks(folder):
        return open_ranks(folder, flags or {})
    stored = OursSource(folder, ours=False)
    common, given = _common(folder), flags or {}
    kept = {name: info for name, info in stored.infos.items() if not LEFT_OUT.fullmatch(name)}
    rows = kept[WORDS].shape[0] if WORDS in kept else 1
    arguments, notes = common.get("args"), tuple[str, ...]()
    if isinstance(arguments, dict):
        settings = Settings(arguments, f"arguments in {folder.name}")
        sections = merged(megatron_sections(settings, rows), given)
        notes = megatron_notes(settings)
    else:
        check_given(given, folder)
        sections = merged({"model": {"vocab_size": rows}}, given)
    run = build_run(sections)
    check_model(run, kept, folder)
    blocks = megatron_blocks(run, kept, folder)
    check_complete(run, blocks, folder)
    check_side(blocks, "theirs", kept, str(folder))
    unused = dict.fromkeys(set(stored.infos) - set(kept), "follows from the flags, or is for training in FP8")
    return ForeignModel(
        sections=sections,
        source=Selected(stored, kept),
        blocks=blocks,
        notes=notes,
        unused=compact(unused) | of_training(common, "args", "content_metadata"),
    )


def _step_folder(folder: Path) -> Path:
    if (folder / INDEX).is_file() or has_ranks(folder):
        return folder
    latest = folder / LATEST
    try:
        word = latest.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: holds neither {INDEX} nor {LATEST}; give a checkpoint of Megatron-LM's") from error
    if word != "release" and not re.fullmatch(r"[0-9]{1,12}", word):
        raise UserError(f"{latest}: holds {word[:40]!r}, which is no iteration")
    step = folder / (word if word == "release" else f"iter_{int(word):07d}")
    if not step.is_dir():
        raise UserError(f"{step}: no such folder; {LATEST} names it")
    if not (step / INDEX).is_file() and not has_ranks(step):
        raise UserError(
            f"{step}: holds neither {INDEX} (--ckpt-format torch_dist) nor mp_rank folders (torch), or is not whole"
        )
    return step


def _common(folder: Path) -> dict[Any, Any]:
    """What all ranks share: the run's arguments, iteration, schedule."""
    file = folder / COMMON_FILE
    if file.is_file():
        content = read_torch_file(file)
    else:
        metadata = read_metadata(folder)
        storage: Mapping[Any, Any] = metadata.storage_data
        place = next((value for key, value in storage.items() if key.fqn == _COMMON), None)
        if place is None:
            return {}
        content = read_torch_file(folder / place.relative_path, place.offset, place.length)
        # A sharded object of one shard is a list of one (megatron/core/dist_checkpointing/strategies/torch.py).
        content = content[0] if isinstance(content, list) and len(content) == 1 else content
    if not isinstance(content, dict):
        raise UserError(f"{folder}: damaged, what its ranks share is no dict")
    return content
