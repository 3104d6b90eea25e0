"""Megatron-LM's models before megatron-core, and what DeepSpeed's experts add to them: names, and how ranks share them.

The state of a rank is a nested dict (`language_model` -> `embedding`, `encoder` -> flat names). Over the years the
decoder was called `transformer` and `encoder`, its attention `attention` and `self_attention`; here everything has the
newer name: `layers.3.self_attention.query_key_value.weight`, `layers.3.mlp.deepspeed_moe.gate.wg.weight`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.foreign.ranks import Joined, join
from megatron_moe.checkpoint.foreign.torch_file import StoredTensor, read_torch_file
from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig

WORDS = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
EXPERT = re.compile(r"(layers\.\d+\.mlp)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
_EXPERT_FILE = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EMBEDDING = re.compile(r"(?:.*\.)?((?:word|position)_embeddings)\.weight")
_LAYER = re.compile(r"(?:.*\.)?(?:encoder|transformer)\.?(layers\.\d+\..+)")
_FINAL = re.compile(r"(?:.*\.)?(?:encoder|transformer)\.(final_layernorm\.(?:weight|bias))")
_OUTPUT = re.compile(r"(?:.*\.)?output_layer\.weight")
_EXTRAS = {
    re.compile(r".*(?:rotary|rotary_emb|rotary_pos_emb)\.inv_freq"): "rotary frequencies follow from the flags",
    re.compile(r".*\.(?:masked_bias|attn_mask|attention_mask|bias_mask)"): "a mask follows from the length",
    re.compile(r"(?:.*\.)?word_embeddings_for_head\.weight"): "a copy of the word embeddings",
    re.compile(r".*_extra_state"): "Transformer Engine's scales are for training in FP8",
}


@dataclass(frozen=True, slots=True)
class State:
    """Tensors of one rank by their newer name, and what is left out."""

    tensors: dict[str, StoredTensor]
    unused: dict[str, str]


def rank_state(tree: Any, source: Path, state: State) -> None:
    """Add the tensors of a rank's state, or of an expert's, to `state`.

    Raises:
        UserError: a tensor has a name that no model of the kind has, or occurs twice.
    """
    for raw, value in _leaves(tree, ""):
        if not isinstance(value, StoredTensor):
            continue
        extra = next((reason for pattern, reason in _EXTRAS.items() if pattern.fullmatch(raw)), None)
        if extra is not None:
            state.unused[raw] = extra
            continue
        name = _newer_name(raw)
        if name is None:
            raise UserError(f"{source}: holds {raw[:120]!r}, which is no part of a GPT of Megatron-LM's")
        if name in state.tensors:
            raise UserError(f"{source}: holds {name} a second time, after {state.tensors[name].storage.path.name}")
        state.tensors[name] = value


def _leaves(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    if not isinstance(tree, dict):
        return [(prefix, tree)]
    found = []
    for key, value in tree.items():
        found += _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _newer_name(raw: str) -> str | None:
    if match := _EMBEDDING.fullmatch(raw):
        return f"embedding.{match[1]}.weight"
    if match := _LAYER.fullmatch(raw) or re.fullmatch(r"(layers\.\d+\..+)", raw):
        # LSoftmaxLinearLayer of PAI's router keeps its linear layer as `weight`.
        name = match[1].replace(".attention.", ".self_attention.")
        return name.replace("gate.wg.weight.weight", "gate.wg.weight")
    if match := _FINAL.fullmatch(raw):
        return match[1]
    return OUTPUT if _OUTPUT.fullmatch(raw) else None


def expert_files(folder: Path) -> dict[tuple[int | None, int, int], Path]:
    """Files of single experts by number of the MoE layer (None: all layers in one file), expert and rank."""
    found = {}
    for path in sorted(folder.iterdir()):
        if match := _EXPERT_FILE.fullmatch(path.name):
            found[None if match[1] is None else int(match[1]), int(match[2]), int(match[3])] = path
    return found


def add_experts(files: Mapping[tuple[int | None, int, int], Path], states: Sequence[State]) -> None:
    """Add the tensors of experts' files to the states of their ranks.

    Raises:
        UserError: a file is damaged, or holds something else than its name says.
    """
    for (_, expert, rank), path in files.items():
        if rank >= len(states):
            continue
        own = State({}, states[rank].unused)
        rank_state(read_torch_file(path), path, own)
        for name, tensor in own.tensors.items():
            if (match := EXPERT.fullmatch(name)) and int(match[2]) != expert:
                raise UserError(f"{path}: holds expert {match[2]}, not {expert}")
            if name in states[rank].tensors:
                before = states[rank].tensors[name].storage.path
                raise UserError(f"{path}: holds {name} a second time, after {before.name}")
            states[rank].tensors[name] = tensor


def check_expert_files(
    files: Mapping[tuple[int | None, int, int], Path], counts: Sequence[int], ranks: int, folder: Path
) -> None:
    """Every expert of every MoE layer must have a file of every rank, and no file may be left over.

    Args:
        files: what `expert_files` found.
        counts: experts of the MoE layers, in order.
        ranks: tensor-parallel size.
        folder: where they lie.

    Raises:
        UserError: names the first file that is missing or left over.
    """
    by_layer = not any(layer is None for layer, _, _ in files)
    layers: Sequence[tuple[int | None, int]] = list(enumerate(counts)) if by_layer else [(None, max(counts, default=0))]
    # One after the other up to the first that is missing: the counts may be anything that a file says.
    wanted = ((layer, expert, rank) for layer, count in layers for expert in range(count) for rank in range(ranks))
    if (missing := next((key for key in wanted if key not in files), None)) is not None:
        layer, expert, rank = missing
        start = "" if layer is None else f"layer_{layer}_"
        name = f"{start}expert_{expert}_mp_rank_{rank:02d}_model_states.pt"
        total = ranks * sum(count for _, count in layers)
        raise UserError(f"{folder / name}: missing; the checkpoint has {total} files of experts")
    most = dict(layers)
    if left := sorted(
        path.name for (layer, expert, rank), path in files.items() if expert >= most.get(layer, 0) or rank >= ranks
    ):
        raise UserError(
            f"{folder / left[0]}: no such expert in a model with {' '.join(map(str, counts))} experts in its MoE "
            f"layers and {ranks} tensor-parallel rank{'s' if ranks > 1 else ''}"
        )


def join_ranks(states: Sequence[State], run: RunConfig, version: float) -> dict[str, Joined]:
    """The model's tensors of those of its ranks, by the newer names.

    Fused projections get one axis more, so that parts that belong together lie side by side whatever the number of
    ranks: query_key_value before checkpoint version 2 becomes [3, heads * D, ...], the first layer of a SwiGLU
    [2, F, ...].

    Args:
        states: of every tensor-parallel rank.
        run: the model.
        version: `checkpoint_version` of the files.

    Raises:
        UserError: a rank lacks a tensor, or shapes do not fit.
    """
    names = set(states[0].tensors)
    for rank, state in enumerate(states[1:], 1):
        if difference := sorted(names.symmetric_difference(state.tensors)):
            having = 0 if difference[0] in names else rank
            raise UserError(f"{difference[0]}: mp_rank_{having:02d} has it, mp_rank_{rank - having:02d} lacks it")
    return {name: _joined(name, [state.tensors[name] for state in states], run, version) for name in sorted(names)}


def _joined(name: str, pieces: list[StoredTensor], run: RunConfig, version: float) -> Joined:
    part = name.rpartition(".deepspeed_experts.")[2] if ".deepspeed_experts." in name else name
    if "query_key_value." in name and version < 2:
        return join(name, [_three(piece, version) for piece in pieces], 1)
    if "query_key_value." in name or name in (WORDS, OUTPUT):
        return join(name, pieces, 0)
    if name.endswith("self_attention.dense.weight"):
        return join(name, pieces, 1)
    if ".mlp." not in name or ".dense_" not in f".{part}":
        return join(name, pieces, None)
    width = run.expert_ffn_size if ".deepspeed_moe." in name or ".mlp.mlp." in name else run.model.ffn_size
    if "dense_h_to_4h." in part:
        rows = width * (2 if run.model.swiglu else 1)
        # Experts are whole on every rank, unless --enable-expert-tensor-parallelism split them.
        axis = None if len(pieces) > 1 and pieces[0].shape[0] == rows else 0
        if run.model.swiglu:
            pieces = [piece.reshaped(2, piece.shape[0] // 2, *piece.shape[1:]) for piece in pieces]
            axis = None if axis is None else 1
        return join(name, pieces, axis)
    if part.endswith("dense_4h_to_h.weight"):
        return join(name, pieces, None if len(pieces) > 1 and pieces[0].shape[1] == width else 1)
    return join(name, pieces, None)


def _three(piece: StoredTensor, version: float) -> StoredTensor:
    """query_key_value of one rank as [3, heads * D, ...]: version 0 has [3, heads, D], version 1 [heads, D, 3], later
    ones [heads, 3, D] (Megatron-LM's `fix_query_key_value_ordering`)."""
    rows, rest = piece.shape[0] // 3, piece.shape[1:]
    if version == 0:
        return piece.reshaped(3, rows, *rest)
    return piece.reshaped(rows, 3, *rest).transposed(0, 1)
