"""DeepSeek-V3 against its class of transformers: the same logits, both ways, and the same bits there and back."""

from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config

from megatron_moe.checkpoint.hf.families.deepseek_v3 import FAMILY
from megatron_moe.config.base import UserError
from megatron_moe.config.model import LATENT_FLAGS, YARN_FLAGS
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run
from tests.helpers.hf_parity import VOCABULARY, exported_alike, imported_alike, moe_like

# No two widths alike.
LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "q_lora_rank": 48,
    "kv_lora_rank": 28,
    "qk_head_dim": 20,
    "qk_pos_emb_head_dim": 12,
    "v_head_dim": 16,
    "qk_layernorm": True,
    "norm_epsilon": 1e-6,
    "moe_router_score_function": "sigmoid",
}
FULL: dict[str, Any] = {
    "num_layers": 3,
    "num_experts": (8,),
    "moe_first_dense_layers": 1,
    "moe_router_topk": 4,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_shared_expert_intermediate_size": 80,
}
# Frequencies that stay, are mixed and are stretched are among the six.
YARN: dict[str, Any] = {
    "rotary_scaling_factor": 40.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
EXPORTS: dict[str, dict[str, Any]] = {
    "all of it": FULL,
    "plain queries, no shared expert, no bias": {"q_lora_rank": None, "rotary_base": 500000},
    "YaRN as DeepSeek has it": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.9},
    "YaRN with another size": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7},
    "YaRN as its paper has it": YARN,
    "one expert a token, narrow shared expert": {"moe_router_topk": 1, "moe_shared_expert_intermediate_size": 24},
}
PRETRAINED = {"original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "kv_lora_rank": 28,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 12,
    "v_head_dim": 16,
    "qk_nope_head_dim": 20,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 50,
}


def run_of(name: str) -> RunConfig:
    return moe_like(**LATENT | EXPORTS[name])


pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("name", EXPORTS)
def test_our_model_as_theirs(name: str, tmp_path: Path) -> None:
    run = run_of(name)
    exported_alike(FAMILY, run, tmp_path / "hf")


@pytest.mark.parametrize(
    "config",
    [
        {"n_shared_experts": 2},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e4, "factor": 8.0, **PRETRAINED}},
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "tie_word_embeddings": True},
    ],
)
def test_their_model_as_ours(config: dict[str, Any], tmp_path: Path) -> None:
    result = imported_alike(FAMILY, DeepseekV3Config(**SIZES | config), tmp_path / "hf")
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in result.keys
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight" in result.keys


def test_a_run_comes_back_from_its_config() -> None:
    for kind in EXPORTS:
        run = run_of(kind)
        again = build_run(FAMILY.flags(FAMILY.config(run)))
        for name in (*LATENT_FLAGS, "head_dim", "rotary_scaling_factor", *YARN_FLAGS):
            assert getattr(again.model, name) == getattr(run.model, name), name
        for name, value in EXPORTS[kind].items():
            if name.startswith("moe") and "shared" not in name:
                assert getattr(again.moe, name) == value, name


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"qk_layernorm": False}, "no --qk-layernorm: DeepseekV3ForCausalLM has a norm"),
        ({"norm_epsilon": 1e-5}, "--norm-epsilon 1e-05: DeepseekV3ForCausalLM normalises latent vectors with 1e-06"),
        ({**YARN, "mscale": 0.5}, "--mscale 0.5 --mscale-all-dim 0: DeepseekV3ForCausalLM takes 1 and 0"),
        ({"moe_layer_freq": (1, 0)}, "dense layer 2: DeepseekV3ForCausalLM has dense layers only before all others"),
        (
            {"num_experts": (8,), "moe_router_topk": 2, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
            "our groups are chosen by their best 1",
        ),
        ({"moe_router_score_function": "softmax"}, "softmax scores of experts: DeepseekV3ForCausalLM has sigmoid"),
    ],
)
def test_what_the_class_does_not_compute(flags: dict[str, Any], reason: str) -> None:
    why_not = FAMILY.why_not(moe_like(**LATENT | flags))
    assert why_not is not None
    assert reason in why_not


def test_a_model_without_latent_vectors_is_none() -> None:
    why_not = FAMILY.why_not(moe_like(moe_router_score_function="sigmoid", qk_layernorm=True, norm_epsilon=1e-6))
    assert why_not is not None
    assert why_not.startswith("no --multi-latent-attention")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_interleave": False}, "rope_interleave false: must be true"),
        ({"attention_bias": True}, "attention_bias true: must be false"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05: must be 1e-06"),
        ({"num_key_value_heads": 64}, "num_key_value_heads 64: must be null or 128"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 40, **PRETRAINED, "attention_factor": 1.1}},
            "attention_factor 1.1: must be null",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 40, **PRETRAINED, "mscale_all_dim": None}},
            "mscale_all_dim null: must be a number greater than 0",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "original_max_position_embeddings null: must be a whole"),
        ({"topk_method": "greedy"}, "topk_method greedy: must be null or noaux_tc"),
        ({"topk_group": 2}, "topk_group 2: must be num_experts_per_tok 8 / 2"),
        ({"first_k_dense_replace": 61}, "first_k_dense_replace 61: must be less than num_hidden_layers 61"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config {'quant_method': 'fp8'}: must be left"),
    ],
)
def test_fields_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        FAMILY.flags(config)
    assert str(error.value).startswith(f"config.json: {message}")
    assert "\n" not in str(error.value)


def test_defaults_are_those_of_transformers() -> None:
    written = DeepseekV3Config().to_dict()
    for name, value in FAMILY.defaults.items():
        found = written["rope_parameters"]["rope_theta"] if name == "rope_theta" else written.get(name)
        if name == "n_routed_experts":
            found = written.get(name, written.get("num_local_experts"))
        assert found == value, name
