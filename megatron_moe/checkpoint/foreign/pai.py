"""PAI's GPT-MoE, as ModelScope publishes it (`PAI/nlp_gpt3_text-generation_0.35B_MoE-64` and its kin).

    config.json                                          model_type gpt-moe
    tokenizer.json                                       BPE on the words that jieba cuts
    model/mp_rank_00/model_rng.pt                        everything but the experts
    model/layer_0_expert_5_mp_rank_00_model_states.pt    expert 5 of the first MoE layer

The model is `modelscope/models/nlp/gpt_moe/distributed_gpt_moe.py`: GPT with learned positions; every second layer has
experts, of which a token takes one, weighed by its softmax probability. Their second biases, and that of the MLP
beside them, are never added (`moe/experts.py`: "Ignore the bias term for now"): ours are zero. The fused bias and GELU
is the approximation by tanh.
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
from megatron_moe.checkpoint.foreign.model import ForeignModel, compact, dtype_notes, merged, of_training
from megatron_moe.checkpoint.foreign.ranks import RankedSource
from megatron_moe.checkpoint.foreign.settings import LONGEST_SAMPLE, Settings, experts_by_layer
from megatron_moe.checkpoint.foreign.torch_file import read_torch_file
from megatron_moe.checkpoint.text_files import read_object
from megatron_moe.config.base import UserError
from megatron_moe.config.yaml_io import Values, build_run
from megatron_moe.moe.layout import expert_layout

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
_FOLDER = "model"
_RANK = re.compile(r"mp_rank_(\d\d)")
# Of a model with experts, and of one without.
_FILES = ("model_rng.pt", "model_optim_rng.pt")
_NOT_ADDED = "never added by the model (modelscope: moe/experts.py)"
_SECOND_BIAS = re.compile(r"layers\.\d+\.mlp\.(?:deepspeed_moe\..*|mlp\.)dense_4h_to_h\.bias")
_NETWORK = re.compile(r"layers\.\d+\.mlp\.deepspeed_moe\.expert_network\.(\d+)\..*")
_NETWORK_EPSILON = 1e-5


def open_pai(folder: Path, flags: Values | None = None) -> ForeignModel:
    """A published GPT-MoE.

    Args:
        folder: what ModelScope downloads: config.json and the folder `model`.
        flags: sections of a run that go over what config.json says.

    Raises:
        UserError: a file is missing or damaged, or the model is one that ours cannot be.
    """
    config = _config(folder)
    states, trees = _states(folder / _FOLDER, config)
    tensors = set(states[0].tensors)
    sections = merged(_sections(config, tensors), flags or {})
    run = build_run(sections)
    version = Settings(trees[0], "checkpoint").number("checkpoint_version", 3.0)
    unused = {name: reason for state in states for name, reason in state.unused.items()}
    for state in states:
        for name in [name for name in state.tensors if _SECOND_BIAS.fullmatch(name)]:
            del state.tensors[name]
            unused[name] = _NOT_ADDED
    words = [state.tensors[WORDS].shape[0] for state in states if WORDS in state.tensors]
    rows = sum(words)
    if rows != (expected := config.whole("vocab_size", 25600)):
        raise UserError(
            f"{folder / _FOLDER}: the embedding has {rows} rows in {len(states)} mp_rank folder"
            f"{'s' if len(states) > 1 else ''}, but {CONFIG} says vocab_size {expected}; is a folder missing?"
        )
    files = expert_files(folder / _FOLDER)
    check_expert_files(files, expert_layout(run).counts, len(states), folder / _FOLDER)
    source = RankedSource(join_ranks(states, run, version))
    blocks = classic_blocks(run, rows, version=version, expert_output_bias=False)
    check_side(blocks, "theirs", source.infos, str(folder / _FOLDER))
    tokenizer = folder / TOKENIZER
    return ForeignModel(
        sections=sections,
        source=source,
        blocks=blocks,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        tokenizer_type="JiebaBPETokenizer" if tokenizer.is_file() else None,
        notes=_notes(config) + dtype_notes(source.infos),
        unused=compact(unused) | of_training(trees[0], "module", "model"),
    )


def _config(folder: Path) -> Settings:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{path}: is missing; a GPT-MoE of PAI's has one")
    content = read_object(path)
    config = Settings(content, str(path))
    if content.get("model_type") != "gpt-moe":
        raise config.refuse("model_type", "'gpt-moe'; for a model of transformers use from-hf")
    return config


def _states(folder: Path, config: Settings) -> tuple[list[State], list[dict[str, Any]]]:
    """What every tensor-parallel rank holds, experts included, and the rest of its file."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; it holds the weights of a GPT-MoE of PAI's")
    ranks = sorted(int(match[1]) for path in folder.iterdir() if (match := _RANK.fullmatch(path.name)))
    if missing := sorted(set(range(max(ranks, default=0) + 1)) - set(ranks)):
        raise UserError(f"{folder / f'mp_rank_{missing[0]:02d}'}: missing")
    name = _FILES[0] if config.wholes("num_experts", 0)[0] > 0 else _FILES[1]
    key = "module" if config.switch("load_ds_ckpts") else "model"
    states, trees = [], []
    for rank in ranks:
        path = folder / f"mp_rank_{rank:02d}" / name
        tree = read_torch_file(path)
        if not isinstance(tree, dict) or not isinstance(tree.get(key), dict):
            raise UserError(f"{path}: holds no {key!r}, where load_ds_ckpts in {CONFIG} says that the weights are")
        state = State({}, {})
        rank_state(tree[key], path, state)
        states.append(state)
        trees.append(tree)
    add_experts(expert_files(folder), states)
    return states, trees


def _sections(config: Settings, tensors: set[str]) -> Values:
    hidden, layers = config.whole("hidden_size", 768), config.layers("num_hidden_layers", 12)
    heads, positions = config.whole("num_attention_heads", 12), config.whole("max_position_embeddings", 2048)
    epsilon = config.number("layernorm_epsilon", 1e-12)
    config.refuse_unless("hidden_act", "gelu", why="the model computes no other")
    config.refuse_unless("apply_residual_connection_post_layernorm", False, why="our layers add before the norm")
    model = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": config.whole("ffn_hidden_size", 4 * hidden),
        "num_attention_heads": heads,
        "seq_length": min(positions, LONGEST_SAMPLE),
        "max_position_embeddings": positions,
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "norm_epsilon": epsilon,
        "gelu_tanh": config.switch("bias_gelu_fusion", True),
        "attention_dropout": config.number("attention_dropout", 0.1),
        "hidden_dropout": config.number("hidden_dropout", 0.1),
        "init_method_std": config.number("init_method_std", 0.02),
        "vocab_size": config.whole("vocab_size", 25600),
    }
    wrong = config.refuse("num_experts", f"one count, or one for each of the {layers // 2} even layers")
    moe = experts_by_layer(config.wholes("num_experts", 0), layers, 2, wrong)
    if not moe:
        return {"model": model}
    config.refuse_unless("top_k_linear_strategy", "standard", "normal", "lsoftmax", why="routers are linear")
    moe |= {"moe_router_topk": 1, "moe_aux_loss_coeff": 0.01}
    moe["mlp_type"] = "residual" if any(".coefficient." in name for name in tensors) else "standard"
    if config.switch("use_expert_residual_network"):
        if epsilon != _NETWORK_EPSILON:
            raise config.refuse(
                "layernorm_epsilon",
                f"{_NETWORK_EPSILON} with use_expert_residual_network, whose norms have it always; ours have one "
                "epsilon for all norms",
            )
        numbers = {match[1] for name in tensors if (match := _NETWORK.fullmatch(name))}
        moe |= {"use_expert_residual_network": True, "expert_residual_layers": len(numbers) or 6}
    return {"model": model, "moe": moe}


def _notes(config: Settings) -> tuple[str, ...]:
    if not config.wholes("num_experts", 0)[0]:
        return ()
    notes = ["tokens over an expert's capacity (factor 1.0) were dropped in training; here none is"]
    if config.get("top_k_linear_strategy") == "lsoftmax":
        notes.append("the published L-Softmax router has margin 1, which makes it the plain router; it is read as one")
    return tuple(notes)
