"""Megatron-DeepSpeed's checkpoints: GPT, dense or with DeepSpeed's experts, with or without a residual MLP (PR-MoE).

    latest                                                         names the folder: global_step50
    global_step50/mp_rank_00_model_states.pt                       everything but the experts, and the run's arguments
    global_step50/layer_0_expert_5_mp_rank_00_model_states.pt      expert 5 of the first MoE layer
    global_step50/expert_5_mp_rank_00_model_states.pt              expert 5 of all layers, as the first versions wrote

The arguments of the run are a pickled namespace, which is read as data. Where a checkpoint has none they are given as
flags. Biases of second layers are added in experts as elsewhere; before 2023 they were not, and stayed zero.
"""

import re
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.convert.coverage import check_side
from megatron_moe.checkpoint.foreign.classic import (
    WORDS,
    State,
    add_experts,
    check_expert_files,
    expert_files,
    join_ranks,
    rank_state,
)
from megatron_moe.checkpoint.foreign.classic_map import classic_blocks
from megatron_moe.checkpoint.foreign.megatron_args import check_given
from megatron_moe.checkpoint.foreign.model import ForeignModel, compact, dtype_notes, merged, of_training
from megatron_moe.checkpoint.foreign.ranks import RankedSource
from megatron_moe.checkpoint.foreign.settings import LONGEST_SAMPLE, Settings, experts_by_layer
from megatron_moe.checkpoint.foreign.torch_file import read_torch_file
from megatron_moe.checkpoint.text_files import read_at_most
from megatron_moe.config.base import UserError
from megatron_moe.config.yaml_io import Values, build_run
from megatron_moe.moe.layout import expert_layout

LATEST = "latest"
_LONGEST_NAME = 4096
_RANK = re.compile(r"mp_rank_(\d\d)_model_states\.pt")
_ZERO_3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d\d_model_states\.pt")
_PIPELINE = re.compile(r"layer_\d+-model(?:_\d+)?-model_states\.pt|layer_\d+-model_\d+.*\.pt")


def open_deepspeed(folder: Path, flags: Values | None = None) -> ForeignModel:
    """A checkpoint of Megatron-DeepSpeed's.

    Args:
        folder: the one that holds `latest`, or one of its `global_step` folders.
        flags: sections of a run that go over what the checkpoint's arguments say, or stand for them.

    Raises:
        UserError: a file is missing or damaged, or the model is one that ours cannot be.
    """
    folder = _step_folder(folder)
    states, tree = _states(folder)
    rows = sum(state.tensors[WORDS].shape[0] for state in states if WORDS in state.tensors)
    arguments, given = tree.get("args"), flags or {}
    if isinstance(arguments, dict):
        settings = Settings(arguments, f"arguments in {folder.name}")
        sections, notes = merged(_sections(settings, rows), given), _notes(settings)
    else:
        sections, notes = merged({"model": {"vocab_size": rows}}, given), ()
        check_given(given, folder)
    run = build_run(sections)
    version = Settings(tree, "checkpoint").number("checkpoint_version", 0.0)
    files = expert_files(folder)
    check_expert_files(files, expert_layout(run).counts, len(states), folder)
    source = RankedSource(join_ranks(states, run, version))
    blocks = classic_blocks(run, rows, version=version, expert_output_bias=True)
    check_side(blocks, "theirs", source.infos, str(folder))
    unused = {name: reason for state in states for name, reason in state.unused.items()}
    return ForeignModel(
        sections=sections,
        source=source,
        blocks=blocks,
        notes=notes + dtype_notes(source.infos),
        unused=compact(unused) | of_training(tree, "module", "args"),
    )


def _step_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds {LATEST}, or a global_step folder")
    latest = folder / LATEST
    if not latest.is_file():
        return folder
    name = read_at_most(latest, _LONGEST_NAME).decode("utf-8", errors="replace").strip()
    # One of those that are here: `..` or a slash would lead elsewhere.
    if name not in {path.name for path in folder.iterdir() if path.is_dir()}:
        raise UserError(f"{latest}: names {name[:80]!r}, which is no folder beside it")
    return folder / name


def _states(folder: Path) -> tuple[list[State], dict[str, Any]]:
    """What every tensor-parallel rank holds, experts included, and the first one's file."""
    found = {int(match[1]): path for path in folder.iterdir() if (match := _RANK.fullmatch(path.name))}
    names = [path.name for path in folder.iterdir()]
    if not found:
        if any(_ZERO_3.fullmatch(name) for name in names):
            raise UserError(
                f"{folder}: ZeRO stage 3 spread its weights over files of the optimizer; gather them with DeepSpeed's "
                "stage3_gather_16bit_weights_on_model_save, or train a step with stage 2"
            )
        raise UserError(f"{folder}: holds no mp_rank_00_model_states.pt; is it a checkpoint of DeepSpeed's?")
    if any(_PIPELINE.fullmatch(name) for name in names):
        raise UserError(
            f"{folder}: is split into files of layers for pipeline parallelism, which is not read; save it once with "
            "--no-pipeline-parallel"
        )
    if missing := sorted(set(range(max(found) + 1)) - set(found)):
        raise UserError(f"{folder / f'mp_rank_{missing[0]:02d}_model_states.pt'}: missing")
    states, trees = [], []
    for _, path in sorted(found.items()):
        tree = read_torch_file(path)
        if not isinstance(tree, dict) or not isinstance(tree.get("module"), dict):
            raise UserError(f"{path}: holds no 'module', where DeepSpeed keeps the weights")
        state = State({}, {})
        rank_state(tree["module"], path, state)
        states.append(state)
        trees.append(tree)
    size = Settings(trees[0], str(folder / "mp_rank_00_model_states.pt")).get("mp_world_size")
    arguments = trees[0].get("args")
    if isinstance(arguments, dict):
        size = arguments.get("tensor_model_parallel_size", size)
    if isinstance(size, int) and size != len(states):
        raise UserError(f"{folder}: holds files of {len(states)} tensor-parallel ranks, but was written by {size}")
    add_experts(expert_files(folder), states)
    return states, trees[0]


def _sections(settings: Settings, rows: int) -> Values:
    hidden, layers = settings.whole("hidden_size"), settings.layers("num_layers")
    heads = settings.whole("num_attention_heads")
    settings.refuse_unless("apply_residual_connection_post_layernorm", False, why="our layers add before the norm")
    settings.refuse_unless("apply_layernorm_1p", False, why="our norms multiply by their weight")
    settings.refuse_unless("num_experts_switch", why="Megatron's own switch MLP is not read")
    settings.refuse_unless("use_alibi_position_embeddings", False, why="positions are learned or rotary")
    settings.refuse_unless("onnx_safe", False, why="GELU is exact or by tanh")
    positions = settings.whole("max_position_embeddings")
    swiglu, rotary = settings.switch("swiglu"), settings.switch("use_rotary_position_embeddings")
    rms = settings.choice("normalization", "layernorm", ("layernorm", "rmsnorm")) == "rmsnorm"
    squared = settings.switch("squared_relu")
    learned = settings.switch("add_position_embedding", not rotary)
    if learned and rotary:
        raise settings.refuse("use_rotary_position_embeddings", "False where add_position_embedding is True")
    tanh = settings.switch("bias_gelu_fusion", True) or settings.switch("openai_gelu")
    model: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": settings.whole("ffn_hidden_size", 4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": settings.whole("num_key_value_heads", heads),
        "kv_channels": settings.whole("kv_channels", max(1, hidden // heads)),
        "seq_length": min(settings.whole("seq_length", positions), positions, LONGEST_SAMPLE),
        "max_position_embeddings": positions,
        "position_embedding_type": "rope" if rotary else "learned_absolute" if learned else "none",
        "rotary_percent": settings.number("rotary_percent", 1.0),
        "rotary_base": settings.whole("rope_theta", 10000),
        "normalization": "RMSNorm" if rms else "LayerNorm",
        "norm_epsilon": settings.number("layernorm_epsilon", 1e-5),
        "swiglu": swiglu,
        "squared_relu": squared,
        "gelu_tanh": tanh and not swiglu and not squared,
        "disable_bias_linear": not settings.switch("add_bias_linear", True),
        "untie_embeddings_and_output_weights": settings.switch("untie_embeddings_and_output_weights"),
        "attention_dropout": settings.number("attention_dropout", 0.1),
        "hidden_dropout": settings.number("hidden_dropout", 0.1),
        "init_method_std": settings.number("init_method_std", 0.02),
        "vocab_size": rows,
    }
    interval = settings.whole("expert_interval", 2)
    wrong = settings.refuse("num_experts", f"one count, or one for each of the {layers // interval} MoE layers")
    moe = experts_by_layer(settings.wholes("num_experts", 1), layers, interval, wrong)
    if moe:
        moe |= {
            "mlp_type": settings.choice("mlp_type", "standard", ("standard", "residual")),
            "moe_router_topk": settings.whole("topk", 1),
            "moe_aux_loss_coeff": settings.number("moe_loss_coeff", 0.01),
        }
    return {"model": model, "moe": moe} if moe else {"model": model}


def _notes(settings: Settings) -> tuple[str, ...]:
    if max(settings.wholes("num_experts", 1)) <= 1:
        return ()
    notes = []
    if settings.switch("moe_token_dropping", True):
        factor = settings.number("moe_train_capacity_factor", 1.0)
        notes.append(
            f"tokens over an expert's capacity (factor {factor:g}) were dropped in training; here none is "
            f"(--moe-expert-capacity-factor {factor:g} --moe-token-drop-policy random goes on as before)"
        )
    if settings.whole("topk", 1) > 1 and settings.switch("moe_top2_2nd_expert_sampling", True):
        notes.append("DeepSpeed adds noise to the choice of the second expert, even in evaluation; here it is the best")
    return tuple(notes)
