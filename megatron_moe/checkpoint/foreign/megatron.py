"""Megatron-LM's distributed checkpoints (`torch_dist`) of a stock `GPTModel`, of megatron-core 0.5 and later.

    latest_checkpointed_iteration.txt
    iter_0005000/.metadata, __0_0.distcp, ...
    iter_0005000/common.pt            the run's arguments; an object in the .distcp files since 0.17

Names and shapes are those of megatron-core, as ours: layers in the name or stacked, norms with the linear layer that
follows them (what Transformer Engine fuses), the halves of a SwiGLU together or apart. Optimizer, generators and the
state of FP8 scales are left out. `megatron_args.py` reads the arguments.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.convert.blocks import Block, Box, cut_rows, only_theirs, whole
from megatron_moe.checkpoint.convert.coverage import check_side
from megatron_moe.checkpoint.convert.ours_reader import OursSource
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.foreign.megatron_args import megatron_notes, megatron_sections
from megatron_moe.checkpoint.foreign.model import ForeignModel, Selected, compact, merged
from megatron_moe.checkpoint.foreign.settings import Settings
from megatron_moe.checkpoint.foreign.torch_file import read_torch_file
from megatron_moe.checkpoint.torch_metadata import FILE as INDEX
from megatron_moe.checkpoint.torch_metadata import read_metadata
from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import Values, build_run

LATEST = "latest_checkpointed_iteration.txt"
COMMON_FILE = "common.pt"
_COMMON = "common_state/shard_0_1"
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
_WORDS, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
# What may stand in a layer, by the name it has with us; norms are found under two names.
_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_IN_LAYER = re.compile(
    r"(?:input_layernorm|pre_mlp_layernorm|self_attention\.(?:linear_qkv|linear_proj|q_layernorm|k_layernorm)|"
    r"mlp\.(?:(?:experts\.experts\.|shared_experts\.)?linear_fc[12]))\.(?:weight|bias)|"
    r"mlp\.router\.(?:weight|expert_bias)|mlp\.shared_experts\.gate_weight"
)
# With biases in linear layers upstream's routers have one too (`transformer/moe/router.py:Router`); ours have none.
_ROUTER_BIAS = "mlp.router.bias"
# `singleton_local_shards` (megatron/core/transformer/mlp.py:apply_swiglu_sharded_factory).
_HALF = re.compile(r"(.*linear_fc1\.(?:weight|bias))_([wv])")
_OUTSIDE = re.compile(r"embedding\.position_embeddings\.weight|decoder\.final_layernorm\.(?:weight|bias)")
_LEFT_OUT = re.compile(r".*(?:_extra_state.*|rotary_pos_emb\.inv_freq)")


def open_megatron(folder: Path, flags: Values | None = None) -> ForeignModel:
    """A distributed checkpoint of Megatron-LM's.

    Args:
        folder: the one that holds the file with the latest iteration, or one of its `iter_` folders.
        flags: sections of a run that go over what the checkpoint's arguments say, or stand for them.

    Raises:
        UserError: a file is missing or damaged, or the model is one that ours cannot be.
    """
    folder = _step_folder(folder)
    stored = OursSource(folder, ours=False)
    common, given = _common(folder), flags or {}
    kept = {name: info for name, info in stored.infos.items() if not _LEFT_OUT.fullmatch(name)}
    if _WORDS not in kept:
        raise UserError(f"{folder}: holds no {_WORDS}; is it a checkpoint of a GPTModel?")
    rows = kept[_WORDS].shape[0]
    arguments, notes = common.get("args"), tuple[str, ...]()
    if isinstance(arguments, dict):
        settings = Settings(arguments, f"arguments in {folder.name}")
        sections = merged(megatron_sections(settings, rows), given)
        notes = megatron_notes(settings)
    else:
        sections = merged({"model": {"vocab_size": rows}}, given)
        _check_given(given, folder)
    run = build_run(sections)
    unused = {name: "of training" for name in common if name not in ("args", "state_dict")}
    unused |= dict.fromkeys(set(stored.infos) - set(kept), "follows from the flags, or is for training in FP8")
    if _OUTPUT in kept and not run.model.untie_embeddings_and_output_weights:
        raise UserError(f"{folder}: holds {_OUTPUT}, though untie_embeddings_and_output_weights is False")
    _check_depth(run, kept, folder)
    blocks = megatron_blocks(run, kept, folder)
    check_side(blocks, "theirs", kept, str(folder))
    return ForeignModel(
        sections=sections, source=Selected(stored, kept), blocks=blocks, notes=notes, unused=compact(unused)
    )


def megatron_blocks(run: RunConfig, infos: Mapping[str, TensorInfo], folder: Path) -> list[Block]:
    """Where every weight of a GPTModel is on our side.

    Args:
        run: the model.
        infos: its tensors, layers in their names.
        folder: names the checkpoint in errors.

    Raises:
        UserError: a tensor is none that our model has.
    """
    blocks = []
    for name, info in infos.items():
        match = _LAYER.fullmatch(name)
        if name in (_WORDS, _OUTPUT):
            padded, rows = run.model.padded_vocab_size, info.shape[0]
            blocks += cut_rows(name, name, max(padded, rows), rows, info.shape[1:])
        elif match is None:
            if not _OUTSIDE.fullmatch(name):
                raise _unknown(name, folder)
            blocks.append(Block(whole(name, info.shape), whole(name, info.shape)))
        else:
            ours = match[2]
            for begin, norm in _NORMS.items():
                if ours.startswith(begin):
                    ours = norm + ours.removeprefix(begin)
            half = _HALF.fullmatch(ours)
            ours = half[1] if half else ours
            if ours == _ROUTER_BIAS:
                blocks += only_theirs(name, info.shape)
                continue
            if not _IN_LAYER.fullmatch(ours):
                raise _unknown(name, folder)
            box = whole(f"decoder.layers.{match[1]}.{ours}", info.shape)
            if half and half[2] == "v":
                axis = 1 if ".experts.experts." in ours else 0
                start = tuple(info.shape[axis] if place == axis else 0 for place in range(len(info.shape)))
                box = Box(box.name, start, box.size)
            blocks.append(Block(box, whole(name, info.shape)))
    return blocks


def _check_depth(run: RunConfig, infos: Mapping[str, TensorInfo], folder: Path) -> None:
    depth = len({match[1] for name in infos if (match := _LAYER.fullmatch(name))})
    if depth != run.model.num_layers:
        raise UserError(f"{folder}: num_layers {run.model.num_layers}, but the weights are of {depth} layers")
    if run.model.untie_embeddings_and_output_weights and _OUTPUT not in infos:
        raise UserError(f"{folder}: lacks {_OUTPUT}, though untie_embeddings_and_output_weights is True")


def _unknown(name: str, folder: Path) -> UserError:
    return UserError(f"{folder}: holds {name}, which is no part of a GPTModel that is read here")


def _step_folder(folder: Path) -> Path:
    if (folder / INDEX).is_file():
        return folder
    latest = folder / LATEST
    try:
        word = latest.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: holds neither {INDEX} nor {LATEST}; give a distributed checkpoint of Megatron-LM's"
        ) from error
    if word != "release" and not re.fullmatch(r"[0-9]{1,12}", word):
        raise UserError(f"{latest}: holds {word[:40]!r}, which is no iteration")
    step = folder / (word if word == "release" else f"iter_{int(word):07d}")
    if not step.is_dir():
        raise UserError(f"{step}: no such folder; {LATEST} names it")
    if not (step / INDEX).is_file():
        raise UserError(
            f"{step}: holds no {INDEX}; it is not a distributed checkpoint (--ckpt-format torch_dist), or is not whole"
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


def _check_given(given: Values, folder: Path) -> None:
    if missing := [name for name in _NEEDED if name not in given.get("model", {})]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(f"{folder}: holds no arguments of its run; give {flags} and what else it was trained with")
