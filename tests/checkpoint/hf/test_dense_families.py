"""Llama, Mistral, Qwen2, Qwen3 and GPT-2 against their classes of transformers: the same logits, both ways, and the
same bits there and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from megatron_moe.checkpoint.hf.families.base import Family
from megatron_moe.checkpoint.hf.families.gpt2 import FAMILY as GPT2
from megatron_moe.checkpoint.hf.families.llama import FAMILY as LLAMA
from megatron_moe.checkpoint.hf.families.llama import MISTRAL
from megatron_moe.checkpoint.hf.families.qwen2 import FAMILY as QWEN2
from megatron_moe.checkpoint.hf.families.qwen3 import FAMILY as QWEN3
from megatron_moe.config.base import UserError
from megatron_moe.config.yaml_io import build_run
from tests.helpers.hf_parity import VOCABULARY, convert, exported_alike, imported_alike, llama_like

GPT2_LIKE: dict[str, Any] = {
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "swiglu": False,
    "disable_bias_linear": False,
    "num_query_groups": None,
    "untie_embeddings_and_output_weights": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Base 500000 over heads of 64 channels: fast, slow and mixed frequencies.
LONG = {"num_attention_heads": 2, "kv_channels": 64, "num_query_groups": 1, "rotary_base": 500000}
EXPORTS: dict[str, tuple[Family, dict[str, Any]]] = {
    "llama": (LLAMA, {"norm_epsilon": 3e-3}),
    "llama 3.2": (LLAMA, {**LONG, "use_rope_scaling": True, "untie_embeddings_and_output_weights": False}),
    "llama with biases": (LLAMA, {"disable_bias_linear": False, "num_query_groups": 4, "kv_channels": 24}),
    "qwen2": (QWEN2, {"add_qkv_bias": True}),
    "qwen3": (QWEN3, {"qk_layernorm": True, "kv_channels": 24, "untie_embeddings_and_output_weights": False}),
    "gpt2": (GPT2, {**GPT2_LIKE, "gelu_tanh": True, "max_position_embeddings": 60}),
    "gpt2, exact GELU, untied": (GPT2, {**GPT2_LIKE, "untie_embeddings_and_output_weights": True}),
    "gpt2, squared ReLU": (GPT2, {**GPT2_LIKE, "squared_relu": True}),
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 50,
}
GPT2_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 50}
IMPORTS: dict[str, tuple[Family, Any]] = {
    "llama": (LLAMA, LlamaConfig(**SIZES, rms_norm_eps=1e-3)),
    "llama 3.1": (LLAMA, LlamaConfig(**SIZES, head_dim=64, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "llama with biases": (LLAMA, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": (MISTRAL, MistralConfig(**SIZES, head_dim=24, sliding_window=50)),
    "qwen2": (QWEN2, Qwen2Config(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen3": (QWEN3, Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=True)),
    "gpt2": (GPT2, GPT2Config(**GPT2_SIZES, n_inner=80)),
    "gpt2, exact GELU, untied": (
        GPT2,
        GPT2Config(**GPT2_SIZES, activation_function="gelu", tie_word_embeddings=False, layer_norm_epsilon=1e-3),
    ),
}


pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("name", EXPORTS)
def test_our_model_as_theirs(name: str, tmp_path: Path) -> None:
    family, flags = EXPORTS[name]
    run = llama_like(**flags)
    result = exported_alike(family, run, tmp_path / "hf")
    again = convert(family.blocks(run), "ours", result.theirs)
    assert again.keys() == result.ours.keys()
    for key, tensor in result.ours.items():
        if key.startswith(("embedding.word_", "output_layer.")):
            # Rows that only pad the table come back as zeros.
            assert not again[key][VOCABULARY:].any()
            again[key][VOCABULARY:] = tensor[VOCABULARY:]
        assert torch.equal(tensor, again[key]), key


@pytest.mark.parametrize("name", IMPORTS)
def test_their_model_as_ours(name: str, tmp_path: Path) -> None:
    """Keys are those of `save_pretrained`, which the map covers to the last number."""
    family, config = IMPORTS[name]
    imported_alike(family, config, tmp_path / "hf")


def test_a_run_comes_back_from_its_config() -> None:
    """The flags that change what a model computes."""
    for family, flags in EXPORTS.values():
        run = llama_like(**flags)
        again = build_run(family.flags(family.config(run)))
        for name in family_flags():
            resolved = {"num_query_groups": "query_groups", "kv_channels": "head_dim", "ffn_hidden_size": "ffn_size"}
            field = {**resolved, "max_position_embeddings": "max_positions"}.get(name, name)
            assert getattr(again.model, field) == getattr(run.model, field), name


def family_flags() -> frozenset[str]:
    from megatron_moe.checkpoint.hf.families.abilities import MATTERS
    from megatron_moe.config.model import ModelConfig

    return MATTERS[ModelConfig]


@pytest.mark.parametrize(
    ("family", "flags", "reason"),
    [
        (LLAMA, {"add_qkv_bias": True}, "--add-qkv-bias: LlamaForCausalLM has none or all of them"),
        (LLAMA, {"qk_layernorm": True}, "--qk-layernorm: LlamaForCausalLM has no norm on queries and keys"),
        (LLAMA, {"cla_share_factor": 2}, "--cla-share-factor 2: LlamaForCausalLM has keys and values in every layer"),
        (LLAMA, {"num_experts": (4,)}, "--num-experts 4: LlamaForCausalLM is dense"),
        (LLAMA, {"swiglu": False, "gelu_tanh": True}, "--gelu-tanh: LlamaForCausalLM has swiglu"),
        (LLAMA, {"hidden_size": 66, "kv_channels": 16}, "--hidden-size 66: LlamaForCausalLM takes a multiple of its 4"),
        (QWEN2, {}, "--disable-bias-linear without --add-qkv-bias: Qwen2ForCausalLM has those of query, key and value"),
        (QWEN2, {"add_qkv_bias": True, "kv_channels": 24}, "--kv-channels 24: Qwen2ForCausalLM has heads of hidden"),
        (QWEN3, {}, "no --qk-layernorm: Qwen3ForCausalLM has a norm on queries and keys"),
        (
            QWEN3,
            {"qk_layernorm": True, "qk_layernorm_type": "projection"},
            "--qk-layernorm-type projection: Qwen3ForCausalLM normalises every head by itself",
        ),
        (QWEN3, {"qk_layernorm": True, "add_qkv_bias": True}, "--add-qkv-bias: Qwen3ForCausalLM has none"),
        (GPT2, {**GPT2_LIKE, "num_query_groups": 2}, "--num-query-groups 2: GPT2LMHeadModel has a key and value for"),
        (GPT2, {**GPT2_LIKE, "normalization": "RMSNorm"}, "--normalization RMSNorm: GPT2LMHeadModel has LayerNorm"),
        (GPT2, {**GPT2_LIKE, "disable_bias_linear": True}, "--disable-bias-linear without --add-qkv-bias: GPT2LMHead"),
    ],
)
def test_what_a_class_does_not_compute(family: Family, flags: dict[str, Any], reason: str) -> None:
    why_not = family.why_not(llama_like(**flags))
    assert why_not is not None
    assert reason in why_not


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        (LLAMA, {"attention_bias": True}, "mlp_bias false: must be true (as attention_bias: biases are in all linear"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act gelu: must be silu or swish"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type linear: must be default"),
        (
            LLAMA,
            {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}},
            "rope_parameters.original_max_position_embeddings 4096: must be 8192",
        ),
        (MISTRAL, {}, "sliding_window 4096: must be null, or not less than max_position_embeddings"),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 1}, "sliding_window 4096: must be null"),
        (
            QWEN2,
            {
                "num_hidden_layers": 2,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            "sliding_window 4096: must be null",
        ),
        (QWEN3, {"attention_bias": True}, "attention_bias true: must be false"),
        (
            QWEN3,
            {"num_hidden_layers": 1, "layer_types": ["linear_attention"]},
            "layer_types ['linear_attention']: must",
        ),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx true: must be false"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights false: must be true"),
        (GPT2, {"activation_function": "relu"}, "activation_function relu: must be gelu_new or gelu_pytorch_tanh or"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention true: must be false"),
        (GPT2, {"n_embd": 100}, "n_embd 100: must be a multiple of n_head 12"),
    ],
)
def test_fields_that_are_not_read(family: Family, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        family.flags(config)
    assert str(error.value).startswith(f"config.json: {message}")
    assert "\n" not in str(error.value)


def test_defaults_are_those_of_transformers() -> None:
    """What a config.json leaves out."""
    for family, config in (
        (LLAMA, LlamaConfig()),
        (MISTRAL, MistralConfig()),
        (QWEN2, Qwen2Config()),
        (QWEN3, Qwen3Config()),
        (GPT2, GPT2Config()),
    ):
        written = config.to_dict()
        for name, value in family.defaults.items():
            if name == "rope_theta":
                assert written["rope_parameters"]["rope_theta"] == value
            elif name == "sliding_window" and "use_sliding_window" in written:
                assert written[name] is None
            else:
                assert written[name] == value, (family.model_type, name)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_as_older_files_spell_it(prefix: str) -> None:
    """With and without the prefix, and with the causal masks that were saved with it."""
    run = llama_like(**GPT2_LIKE, gelu_tanh=True)
    names = {block.theirs.name for block in GPT2.blocks(run) if block.theirs is not None}
    older = {prefix + name.removeprefix("transformer.") for name in names}
    masks = {f"{prefix}h.{layer}.attn.{name}" for layer in range(2) for name in ("bias", "masked_bias")}
    assert {GPT2.stored_name(name) for name in older} == names
    assert {GPT2.stored_name(name) for name in masks} == {None}
    assert GPT2.stored_name("lm_head.weight") == "lm_head.weight"
    assert GPT2.stored_name(f"{prefix}h.0.attn.c_attn.bias") == "transformer.h.0.attn.c_attn.bias"
    assert LLAMA.stored_name("model.layers.0.self_attn.rotary_emb.inv_freq") is None
