"""Megatron-LM's arguments, as a checkpoint keeps them, as our flags; what our model cannot be is refused by name."""

from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.foreign.settings import LONGEST_SAMPLE, Settings
from megatron_moe.config.base import ConfigError
from megatron_moe.config.yaml_io import Values

# Arguments that change what the model computes, their values that do not, and what our model has.
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "multi_latent_attention": ((False,), "attention of the MLA kind is not read"),
    "apply_layernorm_1p": ((False,), "our norms multiply by their weight"),
    "apply_residual_connection_post_layernorm": ((False,), "our layers add before the norm"),
    "quick_geglu": ((False,), "gated MLPs are SwiGLU"),
    "onnx_safe": ((False,), "GELU is exact or by tanh"),
    "glu_linear_offset": ((0, 0.0), "gated MLPs are SwiGLU"),
    "activation_func_clamp_value": ((), "activations are not clamped"),
    "rotary_interleaved": ((False,), "rotary embeddings turn halves"),
    "rotary_seq_len_interpolation_factor": ((1, 1.0), "positions are not interpolated"),
    "no_rope_freq": ((0,), "all layers have positions, or none"),
    "qk_l2_norm": ((False,), "queries and keys are normalised by --qk-layernorm"),
    "window_size": ((), "every token attends to all before it"),
    "softmax_type": (("vanilla",), "attention has no sinks"),
    "attention_output_gate": ((False,), "attention has no gate"),
    "experimental_attention_variant": ((), "attention is softmax attention"),
    "linear_attention_type": ((), "attention is softmax attention"),
    "mtp_num_layers": ((0,), "there are no layers for multi-token prediction"),
    "is_hybrid_model": ((False,), "layers are transformer layers"),
    "hybrid_override_pattern": ((), "layers are transformer layers"),
    "hybrid_layer_pattern": ((), "layers are transformer layers"),
    "heterogeneous_layers_config_path": ((), "layers differ in their experts only"),
    "heterogeneous_layers_config_encoded_json": ((), "layers differ in their experts only"),
    "moe_apply_probs_on_input": ((False,), "weights multiply what experts return"),
    "moe_router_topk_limited_devices": ((), "groups are --moe-router-num-groups"),
    "moe_latent_size": ((), "experts work in the hidden size"),
    "moe_mlp_glu_interleave_size": ((), "gates lie before values, not between them"),
    "moe_shared_expert_glu_interleave_size": ((), "gates lie before values, not between them"),
    "use_mup": ((False,), "embeddings, scores and logits are not multiplied (MuP)"),
    "mup_embedding_mult": ((1, 1.0), "embeddings are not multiplied"),
    "mup_output_mult": ((1, 1.0), "logits are not multiplied"),
    "softmax_scale": ((), "scores are divided by the root of the head width"),
    "group_query_attention": ((True, False), ""),
    "use_legacy_models": ((False,), "models are megatron-core's"),
}
_NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
_SCORES = ("softmax", "sigmoid")
_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn")
_POSITIONS = ("learned_absolute", "rope", "none")


def megatron_sections(settings: Settings, rows: int) -> Values:
    """The sections that make the same model.

    Args:
        settings: the arguments.
        rows: of the embedding, padding included.

    Raises:
        UserError: an argument has a value that our model has no flag for.
    """
    for name, (legal, why) in _REFUSED.items():
        settings.refuse_unless(name, *legal, why=why)
    hidden, layers = settings.whole("hidden_size"), settings.layers("num_layers")
    heads = settings.whole("num_attention_heads")
    positions = settings.whole("max_position_embeddings", settings.whole("seq_length", 2048))
    swiglu, squared = settings.switch("swiglu"), settings.switch("squared_relu")
    grouped = settings.switch("group_query_attention")
    epsilon = settings.number("norm_epsilon", settings.number("layernorm_epsilon", 1e-5))
    biases = settings.switch("add_bias_linear", not settings.switch("disable_bias_linear"))
    model: dict[str, Any] = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": settings.whole("ffn_hidden_size", 4 * hidden),
        "num_attention_heads": heads,
        "num_query_groups": settings.whole("num_query_groups", heads) if grouped else heads,
        "kv_channels": settings.whole("kv_channels", max(1, hidden // heads)),
        "seq_length": min(settings.whole("seq_length", positions), positions, LONGEST_SAMPLE),
        "max_position_embeddings": positions,
        "position_embedding_type": settings.choice("position_embedding_type", _POSITIONS[0], _POSITIONS),
        "rotary_base": settings.whole("rotary_base", 10000),
        "rotary_percent": settings.number("rotary_percent", 1.0),
        "normalization": settings.choice("normalization", "LayerNorm", ("LayerNorm", "RMSNorm")),
        "norm_epsilon": epsilon,
        "swiglu": swiglu,
        "squared_relu": squared,
        "gelu_tanh": not swiglu and not squared and _by_tanh(settings, biases, layers),
        "disable_bias_linear": not biases,
        "add_qkv_bias": settings.switch("add_qkv_bias"),
        "untie_embeddings_and_output_weights": settings.switch("untie_embeddings_and_output_weights"),
        "qk_layernorm": settings.switch("qk_layernorm"),
        "attention_dropout": settings.number("attention_dropout", 0.1),
        "hidden_dropout": settings.number("hidden_dropout", 0.1),
        "init_method_std": settings.number("init_method_std", 0.02),
        "vocab_size": rows,
    }
    if settings.switch("use_rope_scaling"):
        model |= {"use_rope_scaling": True, "rope_scaling_factor": settings.number("rope_scaling_factor", 8.0)}
    if settings.get("num_experts") is None:
        return {"model": model}
    return {"model": model, "moe": _experts(settings, layers)}


def _by_tanh(settings: Settings, biases: bool, layers: int) -> bool:
    """Whether GELU is the approximation: the fused bias and GELU is, which needs biases, and grouped experts have
    not (`megatron/core/transformer/moe/experts.py:TEGroupedMLP`)."""
    if settings.switch("openai_gelu"):
        return True
    fused = settings.switch("bias_gelu_fusion", True) and biases
    if not fused or settings.get("num_experts") is None or not settings.switch("moe_grouped_gemm"):
        return fused
    all_experts = _layer_pattern(settings, layers) is None or all(_layer_pattern(settings, layers) or ())
    if not all_experts or settings.get("moe_shared_expert_intermediate_size") is not None:
        raise settings.refuse(
            "bias_gelu_fusion",
            "False with moe_grouped_gemm and dense MLPs: they had GELU by tanh, experts the exact one",
        )
    return False


def _layer_pattern(settings: Settings, layers: int) -> tuple[int, ...] | None:
    """One 0 or 1 for each layer; None where all have experts. A number N means layers 0, N, 2N, ..."""
    freq = settings.get("moe_layer_freq", 1)
    if isinstance(freq, int) and not isinstance(freq, bool) and freq > 0:
        pattern = tuple(int(layer % freq == 0) for layer in range(layers))
    elif isinstance(freq, (list, tuple)) and len(freq) == layers and all(item in (0, 1) for item in freq):
        pattern = tuple(int(item) for item in freq)
    else:
        raise settings.refuse("moe_layer_freq", f"a number, or {layers} numbers that are 0 or 1")
    return None if all(pattern) else pattern


def _experts(settings: Settings, layers: int) -> dict[str, Any]:
    balancing, coefficient = _first(settings, "moe_router_load_balancing_type", "aux_loss"), None
    if balancing not in _BALANCING:
        raise settings.refuse("moe_router_load_balancing_type", " or ".join(_BALANCING))
    coefficient = _first(settings, "moe_aux_loss_coeff", 0.0)
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float):
        raise settings.refuse("moe_aux_loss_coeff", "a number")
    topk, score = settings.whole("moe_router_topk", 2), settings.choice("moe_router_score_function", "softmax", _SCORES)
    pre_softmax = settings.switch("moe_router_pre_softmax")
    if score == "softmax" and topk == 1 and not pre_softmax:
        raise settings.refuse(
            "moe_router_pre_softmax",
            "True with moe_router_topk 1; a router that weighs its only choice by 1 is not read",
        )
    moe: dict[str, Any] = {
        "num_experts": (settings.whole("num_experts"),),
        "moe_router_topk": topk,
        "moe_router_score_function": score,
        "moe_router_load_balancing_type": balancing,
        "moe_aux_loss_coeff": float(coefficient),
    }
    if score == "softmax":
        moe["moe_router_pre_softmax"] = pre_softmax
    if (pattern := _layer_pattern(settings, layers)) is not None:
        moe["moe_layer_freq"] = pattern
    for name in (
        "moe_ffn_hidden_size",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_shared_expert_intermediate_size",
    ):
        if settings.get(name) is not None:
            moe[name] = settings.whole(name)
    for name in ("moe_router_topk_scaling_factor", "moe_z_loss_coeff", "moe_input_jitter_eps"):
        if settings.get(name) is not None:
            moe[name] = settings.number(name)
    for name in ("moe_router_enable_expert_bias", "moe_shared_expert_gate"):
        if settings.switch(name):
            moe[name] = True
    return moe


def _first(settings: Settings, name: str, default: Any) -> Any:
    """A value, or the only one of a list.

    Raises:
        UserError: the list has several.
    """
    value = settings.get(name, default)
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != 1:
        raise settings.refuse(name, "one value; losses of several kinds together are not read")
    return value[0]


def check_given(given: Values, folder: Path) -> None:
    """What must be given as flags where a checkpoint holds no arguments.

    Raises:
        ConfigError: names the flags that are missing.
    """
    if missing := [name for name in _NEEDED if name not in given.get("model", {})]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(f"{folder}: holds no arguments of its run; give {flags} and what else it was trained with")


def megatron_notes(settings: Settings) -> tuple[str, ...]:
    """What differs in training."""
    factor = settings.get("moe_expert_capacity_factor")
    if factor is None:
        return ()
    return (
        f"tokens over an expert's capacity (factor {factor}) were dropped; here none is "
        f"(--moe-expert-capacity-factor {factor} goes on as before)",
    )
