"""The model class that travels with the checkpoint: for every model of ours that no class of transformers computes.

Its files (`CODE_FILES`) are copied into the exported folder as they are, and `AUTO_MAP` in config.json points to them.
Names on disk are names in memory, experts stacked, so that loading converts nothing.

Shape legend: H = hidden size, F = width of an MLP, E = experts, V = vocabulary, K = experts of a token, D = head width.
"""

import math
import shutil
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.convert.blocks import (
    Block,
    cut_rows,
    place,
    rename,
    shift,
    split_qkv,
)
from megatron_moe.checkpoint.hf.families import parts
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.fields import LONGEST_SAMPLE, SOURCE, Fields, check_storage
from megatron_moe.config.attention import is_cross_layer
from megatron_moe.config.base import UserError
from megatron_moe.config.model import MOST_DOMAINS, MOST_LAYERS, YARN_FLAGS, ModelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.expert_residual import EXPANSION
from megatron_moe.moe.layout import expert_layout

CODE_FILES = ("configuration_megatron_moe.py", "modeling_megatron_moe.py")
AUTO_MAP = {
    "AutoConfig": "configuration_megatron_moe.MegatronMoeConfig",
    "AutoModel": "modeling_megatron_moe.MegatronMoeModel",
    "AutoModelForCausalLM": "modeling_megatron_moe.MegatronMoeForCausalLM",
}
# Routers that choose the best of their logits outside of training, with all flags of `topk`.
_TOPK_ROUTERS = ("topk", "large-margin", "recycle", "token-embedding")
_FIXED_ROUTERS = ("hash", "random-routed")
_DTYPES = {"fp32": "float32", "fp64": "float64"}
_COMBINES = {None: {}, "softmax": {"mlp_type": "residual"}, "add": {"mlp_type": "residual", "residual_combine": "add"}}


def copy_code(folder: str | Path) -> None:
    """Put the class's files into a folder."""
    for name in CODE_FILES:
        shutil.copyfile(Path(__file__).parent / name, Path(folder) / name)


class RemoteCode:
    """`MegatronMoeForCausalLM`: everything that our model computes outside of training."""

    model_type = "megatron_moe"
    architecture = "MegatronMoeForCausalLM"
    skips_later_layers = False

    def reasons(self, run: RunConfig) -> tuple[str, ...]:
        """What of the run's model the class does not compute: nothing.

        No router of ours looks at other tokens outside of training, not even expert choice, which has its cutoffs then;
        nor do the flags of training change what is computed.
        """
        del run
        return ()

    def why_not(self, run: RunConfig) -> str | None:
        """The reasons on one line; None where it is exact."""
        return "; ".join(self.reasons(run)) or None

    def config(self, run: RunConfig) -> dict[str, Any]:
        """Every field of the class's config, resolved."""
        return {"auto_map": dict(AUTO_MAP), **_model_fields(run.model), **_expert_fields(run)}

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections `model`, `moe` and `routing` that make the same model.

        Raises:
            UserError: a field has a value that our model has no flag for.
        """
        from megatron_moe.checkpoint.hf.remote.configuration_megatron_moe import MegatronMoeConfig

        # What a file leaves out has the class's default.
        try:
            resolved = MegatronMoeConfig(**{key: value for key, value in config.items() if key != "auto_map"})
        except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            raise UserError(f"{SOURCE}: {str(error).removeprefix('config: ')}") from error
        fields = Fields(resolved.to_dict(), {})
        check_storage(fields)
        moe, routing = _expert_flags(fields)
        sections = {"model": _model_flags(fields), "moe": moe, "routing": routing}
        return {name: values for name, values in sections.items() if values}

    def blocks(self, run: RunConfig) -> list[Block]:
        """Where every weight and table is on both sides."""
        model = run.model
        blocks = parts.decoder(run, _layer)
        if model.position_embedding_type == "learned_absolute":
            shape = (model.max_positions, model.hidden_size)
            blocks += rename("embedding.position_embeddings.weight", "model.embed_positions.weight", shape)
        if model.domain_embedding:
            shape = (model.num_domains or 1, model.hidden_size)
            blocks += rename("embedding.tokentype_embeddings.weight", "model.embed_domains.weight", shape)
        layout = expert_layout(run)
        if layout.num_moe_layers and run.shares_routing_embedding:
            blocks += _routing_embedding(run, "routing_embedding.", "model.routing_embedding.", set(layout.counts))
        return blocks

    def stored_name(self, name: str) -> str | None:
        """The same: there are no older files."""
        return name

    def fp32_names(self, run: RunConfig) -> frozenset[str]:
        """Biases of the choice of experts and cutoffs, as the class keeps them."""
        kept = [name for name, wanted in (("expert_bias", _has_bias(run)), ("cutoffs", _has_cutoffs(run))) if wanted]
        numbers = expert_layout(run).moe_layers
        return frozenset(f"{_their_layer(number - 1)}mlp.router.{name}" for number in numbers for name in kept)


FAMILY = RemoteCode()


def _has_bias(run: RunConfig) -> bool:
    return run.moe.moe_router_enable_expert_bias


def _has_cutoffs(run: RunConfig) -> bool:
    return run.moe.router == "expert-choice"


# ---- config.json


def _model_fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": _activation(model),
        "gated_mlp": model.swiglu,
        "linear_bias": not model.disable_bias_linear,
        "attention_bias": _qkv_biased(model),
        "norm_type": model.normalization.lower(),
        "norm_eps": model.norm_epsilon,
        **_attention_fields(model),
        "position_embedding_type": model.position_embedding_type,
        "max_position_embeddings": model.max_positions,
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "rotary_scaling_factor": model.rope_scaling_factor if model.use_rope_scaling else None,
        "kv_share_factor": model.cla_share_factor,
        "num_domains": model.num_domains,
        "domain_names": None if model.domain_names is None else list(model.domain_names),
        "domain_embedding": model.domain_embedding,
        "attention_dropout": model.attention_dropout,
        "hidden_dropout": model.hidden_dropout,
        "initializer_range": model.init_method_std,
        "use_cache": True,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
    }


def _qkv_biased(model: ModelConfig) -> bool:
    return model.add_qkv_bias or not (model.disable_bias_linear or model.multi_latent_attention)


def _attention_fields(model: ModelConfig) -> dict[str, Any]:
    kind = "latent" if model.multi_latent_attention else model.qk_layernorm_type
    norm = {"qk_norm": kind if model.qk_layernorm else None}
    if not model.multi_latent_attention:
        return norm
    return norm | {
        "kv_lora_rank": model.kv_lora_rank,
        "q_lora_rank": model.q_lora_rank,
        "qk_nope_head_dim": model.qk_head_dim,
        "qk_rope_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "rotary_yarn": _yarn_fields(model),
    }


def _yarn_fields(model: ModelConfig) -> dict[str, float] | None:
    factor = model.rotary_scaling_factor
    return None if factor is None else {"factor": factor, **{name: getattr(model, name) for name in YARN_FLAGS}}


def _activation(model: ModelConfig) -> str:
    if model.swiglu:
        return "silu"
    if model.gelu_tanh:
        return "gelu_pytorch_tanh"
    return "relu2" if model.squared_relu else "gelu"


def _expert_fields(run: RunConfig) -> dict[str, Any]:
    moe, routing = run.moe, run.routing
    layout = expert_layout(run)
    if not layout.num_moe_layers:
        return {"experts_per_layer": list(layout.experts_per_layer)}
    balanced = moe.router in _TOPK_ROUTERS and moe.moe_router_load_balancing_type.endswith("aux_loss")
    shares = routing.router_domain_shares
    return {
        "experts_per_layer": list(layout.experts_per_layer),
        "moe_intermediate_size": run.expert_ffn_size,
        "num_experts_per_tok": moe.moe_router_topk,
        "router_type": moe.router,
        "router_sinkhorn": moe.moe_router_load_balancing_type == "sinkhorn",
        "router_dtype": _DTYPES[moe.moe_router_dtype],
        "router_scale": routing.router_margin_scale,
        "router_embedding_size": routing.router_embedding_size,
        "router_embedding_shared": routing.router_embedding_shared,
        "router_domain_shares": None if shares is None else list(shares),
        "score_function": moe.moe_router_score_function,
        "softmax_before_topk": moe.pre_softmax,
        "routed_scaling_factor": moe.moe_router_topk_scaling_factor,
        "n_group": moe.moe_router_num_groups,
        "topk_group": moe.moe_router_group_topk,
        "use_expert_bias": _has_bias(run),
        "residual_combine": moe.residual_combine if moe.mlp_type == "residual" else None,
        "expert_residual_layers": moe.expert_residual_layers if moe.use_expert_residual_network else 0,
        "shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        "shared_expert_gate": moe.moe_shared_expert_gate,
        "expert_dropout": moe.moe_expert_dropout,
        "router_aux_loss_coef": moe.moe_aux_loss_coeff if balanced else 0.0,
        "output_router_logits": False,
    }


def _model_flags(fields: Fields) -> dict[str, Any]:
    positions = fields.whole("max_position_embeddings")
    base = fields.number("rotary_base")
    if base != int(base):
        raise fields.refuse("rotary_base", "a whole number (--rotary-base)")
    rope = fields.get("position_embedding_type") == "rope"
    stretch = fields.get("rotary_scaling_factor")
    rotary = {"rotary_base": int(base), "rotary_percent": fields.number("rotary_percent")}
    if stretch is not None:
        rotary |= {"use_rope_scaling": True, "rope_scaling_factor": fields.number("rotary_scaling_factor")}
    norm = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[fields.get("norm_type")]
    names = fields.get("domain_names")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise fields.refuse("domain_names", "null, or a list of names")
    return {
        "num_layers": fields.whole("num_hidden_layers"),
        "hidden_size": fields.whole("hidden_size"),
        "ffn_hidden_size": fields.whole("intermediate_size"),
        "num_attention_heads": fields.whole("num_attention_heads"),
        **(_head_flags(fields) if fields.get("kv_lora_rank") is None else _latent_flags(fields)),
        "seq_length": min(positions, LONGEST_SAMPLE),
        "max_position_embeddings": positions,
        "position_embedding_type": fields.get("position_embedding_type"),
        **(rotary if rope else {}),
        "normalization": norm,
        "norm_epsilon": fields.number("norm_eps"),
        **_activation_flags(fields),
        "disable_bias_linear": not fields.flag("linear_bias"),
        "untie_embeddings_and_output_weights": not fields.flag("tie_word_embeddings"),
        "cla_share_factor": fields.whole("kv_share_factor"),
        "num_domains": None if fields.get("num_domains") is None else _at_most(fields, "num_domains", MOST_DOMAINS),
        "domain_names": None if names is None else tuple(names),
        "domain_embedding": fields.flag("domain_embedding"),
        "attention_dropout": fields.fraction("attention_dropout"),
        "hidden_dropout": fields.fraction("hidden_dropout"),
        "init_method_std": fields.number("initializer_range"),
        "vocab_size": fields.whole("vocab_size"),
    }


def _head_flags(fields: Fields) -> dict[str, Any]:
    """Of attention with keys and values of its own."""
    norm, bias, qkv_bias = fields.get("qk_norm"), fields.flag("linear_bias"), fields.flag("attention_bias")
    if norm == "latent":
        raise fields.refuse("qk_norm", "null, head or projection without kv_lora_rank")
    fields.only("rotary_yarn", None, why="kv_lora_rank is not given")
    if bias and not qkv_bias:
        raise fields.refuse("attention_bias", "true where linear_bias is")
    return {
        "num_query_groups": fields.whole("num_key_value_heads"),
        "kv_channels": fields.whole("head_dim"),
        "add_qkv_bias": qkv_bias and not bias,
        "qk_layernorm": norm is not None,
        "qk_layernorm_type": norm or "head",
    }


def _latent_flags(fields: Fields) -> dict[str, Any]:
    """Of attention with latent vectors."""
    fields.only("qk_norm", None, "latent", why="kv_lora_rank is given")
    fields.only("attention_bias", False, why="projections of latent vectors have no biases")
    fields.only("num_key_value_heads", fields.get("num_attention_heads"), why="every head has its key")
    return {
        "multi_latent_attention": True,
        "kv_lora_rank": fields.whole("kv_lora_rank"),
        "q_lora_rank": None if fields.get("q_lora_rank") is None else fields.whole("q_lora_rank"),
        "qk_head_dim": fields.whole("qk_nope_head_dim"),
        "qk_pos_emb_head_dim": fields.whole("qk_rope_head_dim"),
        "v_head_dim": fields.whole("v_head_dim"),
        **_yarn_flags(fields),
        "qk_layernorm": fields.get("qk_norm") is not None,
    }


def _yarn_flags(fields: Fields) -> dict[str, Any]:
    given = fields.get("rotary_yarn")
    if given is None:
        return {}
    names = {"factor", *YARN_FLAGS}
    numbers = isinstance(given, dict) and all(
        type(value) in (int, float) and math.isfinite(value) for value in given.values()
    )
    if not numbers or given.keys() != names:
        raise fields.refuse("rotary_yarn", f"null, or numbers for {', '.join(sorted(names))}")
    length = given["original_max_position_embeddings"]
    if length != int(length):
        raise fields.refuse("rotary_yarn", "with a whole original_max_position_embeddings")
    flags = {name: float(given[name]) for name in YARN_FLAGS}
    return flags | {"rotary_scaling_factor": float(given["factor"]), "original_max_position_embeddings": int(length)}


def _at_most(fields: Fields, name: str, most: int, least: int = 1) -> int:
    """A whole number of things that are counted one by one: a file that means harm must not take all memory."""
    value = fields.whole(name, least)
    if value > most:
        raise fields.refuse(name, f"at most {most}")
    return value


def _activation_flags(fields: Fields) -> dict[str, bool]:
    act, gated = fields.get("hidden_act"), fields.flag("gated_mlp")
    if gated != (act == "silu"):
        raise fields.refuse("hidden_act", "silu where gated_mlp is true, and only there (--swiglu)")
    return {"swiglu": gated, "squared_relu": act == "relu2", "gelu_tanh": act == "gelu_pytorch_tanh"}


def _expert_flags(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections `moe` and `routing`."""
    counts = fields.get("experts_per_layer")
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise fields.refuse("experts_per_layer", "a list of one whole number for each layer")
    if not any(counts):
        return {}, {}
    router = fields.get("router_type")
    moe: dict[str, Any] = {
        "num_experts": tuple(count for count in counts if count),
        "moe_layer_freq": tuple(int(count > 0) for count in counts),
        "moe_ffn_hidden_size": fields.whole("moe_intermediate_size"),
        "moe_expert_dropout": fields.fraction("expert_dropout"),
        "router": router,
        "moe_router_topk": fields.whole("num_experts_per_tok"),
        **_COMBINES[fields.get("residual_combine")],
    }
    if layers := _at_most(fields, "expert_residual_layers", MOST_LAYERS, least=0):
        moe |= {"use_expert_residual_network": True, "expert_residual_layers": layers}
    if fields.get("shared_expert_intermediate_size") is not None:
        moe["moe_shared_expert_intermediate_size"] = fields.whole("shared_expert_intermediate_size")
    moe["moe_shared_expert_gate"] = fields.flag("shared_expert_gate")
    if router not in _FIXED_ROUTERS:
        moe["moe_router_dtype"] = {name: flag for flag, name in _DTYPES.items()}[fields.get("router_dtype")]
    if router in _TOPK_ROUTERS:
        moe |= _topk_flags(fields)
    if router == "recycle":
        # Of training only, where it must be given: Hunyuan-Large's.
        moe["moe_expert_capacity_factor"] = 1.0
    return moe, _routing_flags(fields, router)


def _topk_flags(fields: Fields) -> dict[str, Any]:
    scaled = fields.get("routed_scaling_factor") is not None
    groups = ("moe_router_num_groups", "n_group"), ("moe_router_group_topk", "topk_group")
    flags: dict[str, Any] = {
        "moe_router_score_function": fields.get("score_function"),
        "moe_router_topk_scaling_factor": fields.number("routed_scaling_factor") if scaled else None,
        **{flag: None if fields.get(name) is None else fields.whole(name) for flag, name in groups},
        "moe_router_enable_expert_bias": fields.flag("use_expert_bias"),
    }
    if flags["moe_router_score_function"] == "softmax":
        flags["moe_router_pre_softmax"] = fields.flag("softmax_before_topk")
    coefficient = fields.number("router_aux_loss_coef") if fields.get("router_aux_loss_coef") else 0.0
    balancing = "aux_loss" if coefficient else "none"
    if fields.flag("router_sinkhorn"):
        balancing, coefficient = "sinkhorn", 0.0
    return {**flags, "moe_router_load_balancing_type": balancing, "moe_aux_loss_coeff": coefficient}


def _routing_flags(fields: Fields, router: str) -> dict[str, Any]:
    if router == "large-margin" and fields.get("router_scale") is not None:
        return {"router_margin_type": "additive", "router_margin_scale": fields.number("router_scale")}
    if router == "token-embedding":
        return {
            "router_embedding_size": fields.whole("router_embedding_size"),
            "router_embedding_shared": fields.flag("router_embedding_shared"),
        }
    shares = fields.get("router_domain_shares")
    if router != "random-routed" or shares is None:
        return {}
    if not isinstance(shares, list) or not all(type(share) is int for share in shares):
        raise fields.refuse("router_domain_shares", "null, or a list of whole numbers")
    return {"router_domain_shares": tuple(shares)}


# ---- weights


def _their_layer(layer: int) -> str:
    return f"model.layers.{layer}."


def _layer(run: RunConfig, layer: int) -> list[Block]:
    theirs = _their_layer(layer)
    mlp = _moe if parts.is_moe(run, layer) else _dense
    attention = _latent_attention if run.model.multi_latent_attention else _attention
    return [
        *parts.layer_norms(run, layer, theirs),
        *attention(run, layer, f"{theirs}self_attn."),
        *mlp(run, layer, f"{theirs}mlp."),
    ]


def _attention(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    model, ours = run.model, f"{parts.our_layer(layer)}self_attention."
    hidden, heads, groups, width = model.hidden_size, model.num_attention_heads, model.query_groups, model.head_dim
    kinds: dict[str, tuple[int, ...]] = {"weight": (hidden,)}
    if model.add_qkv_bias or not model.disable_bias_linear:
        kinds["bias"] = ()
    blocks = []
    for kind, rest in kinds.items():
        if is_cross_layer(layer + 1, model.cla_share_factor):
            blocks += rename(f"{ours}linear_q.{kind}", f"{theirs}q_proj.{kind}", (heads * width, *rest))
        else:
            query, key, value = (f"{theirs}{part}_proj.{kind}" for part in "qkv")
            blocks += split_qkv(f"{ours}linear_qkv.{kind}", (query, key, value), groups, heads // groups, width, rest)
    blocks += _linear(f"{ours}linear_proj", f"{theirs}o_proj", (hidden, heads * width), bias=_biased(run))
    if model.qk_layernorm:
        whole = model.qk_layernorm_type == "projection"
        blocks += parts.norm(model, f"{ours}q_layernorm", f"{theirs}q_norm", heads * width if whole else width)
        blocks += parts.norm(model, f"{ours}k_layernorm", f"{theirs}k_norm", groups * width if whole else width)
    return blocks


def _latent_attention(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    model, ours = run.model, f"{parts.our_layer(layer)}self_attention."
    hidden, heads, rank, latent = model.hidden_size, model.num_attention_heads, model.q_lora_rank, model.kv_lora_rank
    queries, turned = heads * model.head_dim, model.qk_pos_emb_head_dim
    matrices: dict[tuple[str, str], tuple[int, int]] = {
        ("linear_kv_down_proj", "kv_a_proj_with_mqa"): (latent + turned, hidden),
        ("linear_kv_up_proj", "kv_b_proj"): (heads * (model.qk_head_dim + model.v_head_dim), latent),
    }
    norms = {("kv_layernorm", "kv_a_layernorm"): latent}
    if rank is None:
        matrices["linear_q_proj", "q_proj"] = (queries, hidden)
    else:
        matrices["linear_q_down_proj", "q_a_proj"] = (rank, hidden)
        matrices["linear_q_up_proj", "q_b_proj"] = (queries, rank)
        norms["q_layernorm", "q_a_layernorm"] = rank
    blocks = _linear(f"{ours}linear_proj", f"{theirs}o_proj", (hidden, heads * model.v_head_dim), bias=_biased(run))
    for (mine, other), shape in matrices.items():
        blocks += _linear(f"{ours}{mine}", f"{theirs}{other}", shape, bias=False)
    for (mine, other), width in norms.items() if model.qk_layernorm else ():
        blocks += parts.norm(model, f"{ours}{mine}", f"{theirs}{other}", width)
    return blocks


def _biased(run: RunConfig) -> bool:
    return not run.model.disable_bias_linear


def _linear(ours: str, theirs: str, shape: tuple[int, int], *, bias: bool) -> list[Block]:
    blocks = rename(f"{ours}.weight", f"{theirs}.weight", shape)
    return blocks + rename(f"{ours}.bias", f"{theirs}.bias", shape[:1]) if bias else blocks


def _mlp(run: RunConfig, ours: str, theirs: str, width: int, *, gated: bool) -> list[Block]:
    """An MLP, from the beginnings of its names."""
    hidden, bias = run.model.hidden_size, _biased(run)
    if gated:
        return parts.gated_mlp(ours, theirs, hidden, width, bias=bias)
    first = _linear(f"{ours}linear_fc1", f"{theirs}up_proj", (width, hidden), bias=bias)
    return first + _linear(f"{ours}linear_fc2", f"{theirs}down_proj", (hidden, width), bias=bias)


def _dense(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    ours = f"{parts.our_layer(layer)}mlp."
    return _mlp(run, ours, theirs, run.model.ffn_size, gated=run.model.swiglu)


def _moe(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    moe, hidden, gated = run.moe, run.model.hidden_size, run.model.swiglu
    ours = f"{parts.our_layer(layer)}mlp."
    blocks = [*_router(run, layer, f"{theirs}router."), *_experts(run, layer, f"{theirs}routed_experts.")]
    shared = moe.moe_shared_expert_intermediate_size
    if shared is not None:
        blocks += _mlp(run, f"{ours}shared_experts.", f"{theirs}shared_expert.", shared, gated=gated)
    if moe.moe_shared_expert_gate:
        blocks += rename(f"{ours}shared_experts.gate_weight", f"{theirs}shared_expert_gate.weight", (1, hidden))
    if moe.mlp_type == "residual":
        blocks += _mlp(run, f"{ours}residual.mlp.", f"{theirs}residual_mlp.", run.expert_ffn_size, gated=gated)
        if moe.residual_combine == "softmax":
            name = f"{theirs}residual_coefficient"
            blocks += _linear(f"{ours}residual.coefficient", name, (2, hidden), bias=True)
    for number in range(moe.expert_residual_layers if moe.use_expert_residual_network else 0):
        block = f"expert_residual.{number}."
        blocks += parts.norm(run.model, f"{ours}{block}norm", f"{theirs}{block}norm", hidden)
        blocks += _mlp(run, f"{ours}{block}mlp.", f"{theirs}{block}mlp.", EXPANSION * hidden, gated=False)
    return blocks


def _experts(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    hidden, width, experts = run.model.hidden_size, run.expert_ffn_size, parts.experts_in(run, layer)
    rows = 2 * width if run.model.swiglu else width
    ours = f"{parts.our_layer(layer)}mlp.experts.experts."
    blocks = rename(f"{ours}linear_fc1.weight", f"{theirs}up_proj", (experts, rows, hidden))
    blocks += rename(f"{ours}linear_fc2.weight", f"{theirs}down_proj", (experts, hidden, width))
    if _biased(run):
        blocks += rename(f"{ours}linear_fc1.bias", f"{theirs}up_bias", (experts, rows))
        blocks += rename(f"{ours}linear_fc2.bias", f"{theirs}down_bias", (experts, hidden))
    return blocks


def _router(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    """Gates, biases and tables; `theirs` as `model.layers.0.mlp.router.`."""
    ours, experts = f"{parts.our_layer(layer)}mlp.router.", parts.experts_in(run, layer)
    blocks: list[Block] = []
    if run.moe.router in _FIXED_ROUTERS:
        return _token_map(run, f"{ours}token_map", f"{theirs}token_map")
    if run.moe.router != "token-embedding":
        blocks += parts.router(run, layer, f"{theirs}weight")
    elif not run.routing.router_embedding_shared:
        blocks += _routing_embedding(run, f"{ours}own.", f"{theirs}embedding.", {experts})
    if _has_bias(run):
        blocks += rename(f"{ours}expert_bias", f"{theirs}expert_bias", (experts,))
    if _has_cutoffs(run):
        blocks += rename(f"{ours}cutoffs", f"{theirs}cutoffs", (experts,))
        blocks += rename(f"{ours}cutoff_steps", f"{theirs}cutoff_steps", (1,))
    return blocks


def _routing_embedding(run: RunConfig, ours: str, theirs: str, counts: set[int]) -> list[Block]:
    width = run.routing.router_embedding_size
    blocks = cut_rows(f"{ours}table", f"{theirs}table", *_rows(run), (width,))
    for count in sorted(counts):
        blocks += rename(f"{ours}gate_{count}", f"{theirs}gate_{count}", (count, width))
    return blocks


def _token_map(run: RunConfig, ours: str, theirs: str) -> list[Block]:
    """Ours has the domains one after the other, [domains * padded V, 1]; theirs is [domains, V, 1]."""
    padded, kept = _rows(run)
    experts = run.moe.moe_router_topk
    if run.moe.router == "hash":
        return cut_rows(ours, theirs, padded, kept, (experts,))
    blocks = []
    for domain in range(run.model.num_domains or 1):
        rows = cut_rows(ours, theirs, padded, kept, (experts,))
        blocks += place(_below(rows, domain * padded), "theirs", theirs, domain)
    return blocks


def _below(blocks: list[Block], rows: int) -> list[Block]:
    """The same blocks, further down in our tensor."""
    return [moved for block in blocks if block.ours for moved in shift([block], "ours", block.ours.name, 0, rows)]


def _rows(run: RunConfig) -> tuple[int, int]:
    """Of a table with a row for each token id: with those that pad it, and without."""
    assert run.model.vocab_size is not None
    return run.model.padded_vocab_size, run.model.vocab_size
