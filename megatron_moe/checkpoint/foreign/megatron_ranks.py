"""Megatron-LM's checkpoints by ranks (`--ckpt-format torch`): a file for each tensor- and pipeline-parallel rank.

    iter_0005000/mp_rank_00/model_optim_rng.pt        tensor-parallel rank 0
    iter_0005000/mp_rank_00_001/model_optim_rng.pt    and pipeline stage 1, whose layers count from 0 again

The state is that of a stock `GPTModel` (`decoder.layers...`), or, until 2023, the nested one of `classic.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.convert.coverage import check_side
from megatron_moe.checkpoint.foreign.classic import WORDS as CLASSIC_WORDS
from megatron_moe.checkpoint.foreign.classic import State, join_ranks, rank_state
from megatron_moe.checkpoint.foreign.classic_map import classic_blocks
from megatron_moe.checkpoint.foreign.megatron_args import check_given, megatron_notes, megatron_sections
from megatron_moe.checkpoint.foreign.megatron_map import (
    FIRST,
    LEFT_OUT,
    OUTPUT,
    WORDS,
    check_complete,
    check_model,
    megatron_blocks,
)
from megatron_moe.checkpoint.foreign.model import ForeignModel, compact, merged, of_training
from megatron_moe.checkpoint.foreign.ranks import Joined, RankedSource, join
from megatron_moe.checkpoint.foreign.settings import Settings
from megatron_moe.checkpoint.foreign.torch_file import StoredTensor, read_torch_file
from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import Values, build_run

_RANK = re.compile(r"mp_rank_(\d\d)(?:_(\d\d\d))?(_\d\d\d)?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_NUMBER = re.compile(r"((?:decoder\.)?layers\.)(\d+)(\..+)")
_ROWS = re.compile(r".*(?:word_embeddings|output_layer|linear_qkv|linear_fc1)\.(?:weight|bias)\d*")
_COLUMNS = re.compile(r".*(?:linear_proj|linear_fc2)\.weight\d*")


@dataclass(frozen=True, slots=True)
class _Rank:
    tree: dict[str, Any]
    path: Path


def has_ranks(folder: Path) -> bool:
    """Whether a folder holds ranks' folders."""
    return folder.is_dir() and any(_RANK.fullmatch(path.name) for path in folder.iterdir())


def open_ranks(folder: Path, given: Values) -> ForeignModel:
    """A checkpoint by ranks.

    Args:
        folder: `iter_0005000`.
        given: sections of a run that go over what the checkpoint's arguments say, or stand for them.

    Raises:
        UserError: a file is missing or damaged, or the model is one that ours cannot be.
    """
    ranks = _read(folder)
    first = ranks[0, 0].tree
    classic = "language_model" in first["model"]
    states = [
        _whole_depth([stage for (own, _), stage in ranks.items() if own == tensor], classic) for tensor in _own(ranks)
    ]
    words = CLASSIC_WORDS if classic else WORDS
    rows = sum(state.tensors[words].shape[0] for state in states if words in state.tensors)
    arguments, notes = first.get("args"), tuple[str, ...]()
    if isinstance(arguments, dict):
        settings = Settings(arguments, f"arguments in {folder.name}")
        sections, notes = merged(megatron_sections(settings, rows), given), megatron_notes(settings)
    else:
        check_given(given, folder)
        sections = merged({"model": {"vocab_size": rows}}, given)
    run = build_run(sections)
    unused = {name: reason for state in states for name, reason in state.unused.items()}
    if not run.model.untie_embeddings_and_output_weights and len(ranks) > len(states):
        # The last pipeline stage has a copy of its own.
        for state in states:
            if state.tensors.pop(OUTPUT, None) is not None:
                unused[OUTPUT] = "the last stage's copy of the embedding"
    if classic:
        version = Settings(first, "checkpoint").number("checkpoint_version", 0.0)
        source = RankedSource(join_ranks(states, run, version))
        blocks = classic_blocks(run, rows, version=version, expert_output_bias=True)
    else:
        joined = _joined(states, run)
        source = RankedSource(joined)
        check_model(run, source.infos, folder)
        split = {name for name, whole in joined.items() if whole.axis == 1 and _is_first(name)}
        blocks = megatron_blocks(run, source.infos, folder, split)
        check_complete(run, blocks, folder)
    check_side(blocks, "theirs", source.infos, str(folder))
    return ForeignModel(
        sections=sections,
        source=source,
        blocks=blocks,
        notes=notes,
        unused=compact(unused) | of_training(first, "model", "args"),
    )


def _own(ranks: Mapping[tuple[int, int], _Rank]) -> list[int]:
    return sorted({tensor for tensor, _ in ranks})


def _read(folder: Path) -> dict[tuple[int, int], _Rank]:
    """Every rank's file by tensor-parallel rank and pipeline stage."""
    ranks = {}
    for path in sorted(folder.iterdir()):
        match = _RANK.fullmatch(path.name)
        if match is None:
            continue
        if match[3]:
            raise UserError(f"{path}: expert-parallel ranks' files are not read; save with --ckpt-format torch_dist")
        file = next((path / name for name in _FILES if (path / name).is_file()), path / _FILES[0])
        tree = read_torch_file(file)
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            legal = "virtual pipeline stages are not read; " if isinstance(tree, dict) and "model0" in tree else ""
            raise UserError(f"{file}: holds no 'model'; {legal}save with --ckpt-format torch_dist")
        ranks[int(match[1]), int(match[2] or 0)] = _Rank(tree, file)
    sizes = [max(key[axis] for key in ranks) + 1 for axis in range(2)]
    arguments = next(iter(ranks.values())).tree.get("args")
    if isinstance(arguments, dict):
        settings = Settings(arguments, f"arguments in {folder.name}")
        settings.refuse_unless("expert_model_parallel_size", 1, why="save with --ckpt-format torch_dist")
        names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
        if settings.get("num_experts") is not None:
            tensor = settings.whole("tensor_model_parallel_size", sizes[0])
            settings.refuse_unless("expert_tensor_parallel_size", tensor, why="save with --ckpt-format torch_dist")
        sizes = [settings.whole(name, size) for name, size in zip(names, sizes, strict=True)]
    for key in [(tensor, stage) for tensor in range(sizes[0]) for stage in range(sizes[1])]:
        if key not in ranks:
            name = f"mp_rank_{key[0]:02d}" + (f"_{key[1]:03d}" if sizes[1] > 1 else "")
            raise UserError(f"{folder / name}: missing; the checkpoint is of {sizes[0]} x {sizes[1]} ranks")
    if len(ranks) != sizes[0] * sizes[1]:
        raise UserError(f"{folder}: holds {len(ranks)} ranks' folders, but was written by {sizes[0]} x {sizes[1]}")
    return dict(sorted(ranks.items()))


def _whole_depth(stages: Sequence[_Rank], classic: bool) -> State:
    """The tensors of a tensor-parallel rank over all pipeline stages, layers counted through."""
    whole, depth = State({}, {}), 0
    for stage in stages:
        own = State({}, whole.unused)
        if classic:
            rank_state(stage.tree["model"], stage.path, own)
        else:
            for name, value in stage.tree["model"].items():
                if LEFT_OUT.fullmatch(str(name)):
                    own.unused[str(name)] = "follows from the flags, or is for training in FP8"
                elif isinstance(value, StoredTensor):
                    own.tensors[str(name)] = value
        layers = 0
        for name, tensor in own.tensors.items():
            if match := _NUMBER.fullmatch(name):
                layers = max(layers, int(match[2]) + 1)
                name = f"{match[1]}{int(match[2]) + depth}{match[3]}"
            if name in whole.tensors:
                raise UserError(f"{stage.path}: holds {name} a second time")
            whole.tensors[name] = tensor
        depth += layers
    return whole


def _is_first(name: str) -> bool:
    return FIRST.fullmatch(name.rstrip("0123456789")) is not None


def _joined(states: Sequence[State], run: RunConfig) -> dict[str, Joined]:
    names = set(states[0].tensors)
    for rank, state in enumerate(states[1:], 1):
        if difference := sorted(names.symmetric_difference(state.tensors)):
            raise UserError(f"{difference[0]}: only one of mp_rank_00 and mp_rank_{rank:02d} has it")
    joined = {}
    for name in states[0].tensors:
        pieces = [state.tensors[name] for state in states]
        if run.model.swiglu and _is_first(name):
            halves = [piece.reshaped(2, piece.shape[0] // 2, *piece.shape[1:]) for piece in pieces]
            joined[name] = join(name, halves, 1)
        else:
            axis = 0 if _ROWS.fullmatch(name) else 1 if _COLUMNS.fullmatch(name) else None
            joined[name] = join(name, pieces, axis)
    return joined
