"""Each MoE family against the class of transformers that it stands for: the same logits, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint.hf.families.base import Family
from megatron_moe.checkpoint.hf.families.glm4_moe import FAMILY as GLM4
from megatron_moe.checkpoint.hf.families.granitemoeshared import FAMILY as GRANITE
from megatron_moe.checkpoint.hf.families.mixtral import FAMILY as MIXTRAL
from megatron_moe.checkpoint.hf.families.qwen2_moe import FAMILY as QWEN2
from megatron_moe.checkpoint.hf.families.qwen3_moe import FAMILY as QWEN3
from tests.helpers.hf_parity import TOLERANCE, export, import_, moe_like

SHARED = {"moe_shared_expert_intermediate_size": 56}
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = {**SIGMOID, "moe_router_enable_expert_bias": True}
BEFORE = {"moe_router_pre_softmax": True}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}

EXPORTS: dict[str, tuple[Family, dict[str, Any]]] = {
    "mixtral": (MIXTRAL, {}),
    "mixtral, tied, long heads": (MIXTRAL, {"untie_embeddings_and_output_weights": False, "kv_channels": 24}),
    "mixtral, llama3 rope": (MIXTRAL, {"use_rope_scaling": True, "rope_scaling_factor": 4.0, "rotary_base": 500000}),
    "qwen3": (QWEN3, {"qk_layernorm": True}),
    "qwen3, top-1, dense layer": (QWEN3, {"qk_layernorm": True, "moe_router_topk": 1, "moe_layer_freq": (0, 1)}),
    "qwen3, weights as they are": (QWEN3, {"qk_layernorm": True, **BEFORE}),
    "granite": (GRANITE, {**SHARED}),
    "granite, residual": (GRANITE, {"mlp_type": "residual", "residual_combine": "add"}),
    "granite, none shared": (GRANITE, {}),
    "qwen2, gated": (QWEN2, {**SHARED, "moe_shared_expert_gate": True}),
    "qwen2, plain shared, top-1, qkv biases": (QWEN2, {**SHARED, "moe_router_topk": 1, "add_qkv_bias": True}),
    "qwen2, residual, dense layer, long heads": (
        QWEN2,
        {
            "mlp_type": "residual",
            "residual_combine": "add",
            "moe_layer_freq": (1, 0),
            "kv_channels": 24,
            "moe_router_topk": 1,
        },
    ),
    "qwen2, none shared, weights as they are": (QWEN2, {"moe_router_topk": 3, **BEFORE}),
    "qwen2, recycle": (QWEN2, {"router": "recycle", "moe_router_topk": 1, "moe_expert_capacity_factor": 1.0}),
    "qwen2, sinkhorn": (QWEN2, {**SINKHORN}),
    "glm4": (GLM4, {**BIAS, **SHARED, "moe_router_topk_scaling_factor": 1.7}),
    "glm4, everything": (
        GLM4,
        {
            **BIAS,
            "num_experts": (8,),
            "moe_router_topk": 4,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_topk_scaling_factor": 2.5,
            "moe_shared_expert_intermediate_size": 80,
            "moe_first_dense_layers": 1,
            "rotary_percent": 0.5,
            "qk_layernorm": True,
            "add_qkv_bias": True,
            "kv_channels": 24,
        },
    ),
    "glm4, top-1, none shared, no bias": (GLM4, {**SIGMOID, "moe_router_topk": 1}),
    "glm4, base": (GLM4, {"router": "base", "moe_router_topk": 1}),
    "glm4, sinkhorn top-1": (GLM4, {**SINKHORN, "moe_router_topk": 1}),
    "mixtral, large margin": (MIXTRAL, {"router": "large-margin", "router_margin": 2.0}),
}


pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("name", EXPORTS)
def test_what_ours_computes_theirs_computes(name: str, tmp_path: Path, record_property: Any) -> None:
    family, flags = EXPORTS[name]
    run = moe_like(**flags)
    assert family.why_not(run) is None
    result = export(family, run, tmp_path / "hf")
    record_property("max difference", result.difference)
    print(f"{name}: {result.difference:.1e} where logits go up to {result.size:.1f}")
    assert result.difference <= TOLERANCE


def their_config(kind: str, **changes: Any) -> Any:
    """A tiny config of transformers."""
    from transformers import AutoConfig

    sizes = {
        "vocab_size": 263,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    own = {
        "mixtral": {"intermediate_size": 40, "num_local_experts": 5},
        "qwen2_moe": {
            "intermediate_size": 72,
            "moe_intermediate_size": 40,
            "shared_expert_intermediate_size": 56,
            "num_experts": 5,
            "num_experts_per_tok": 2,
        },
        "qwen3_moe": {
            "intermediate_size": 72,
            "moe_intermediate_size": 40,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "head_dim": 24,
        },
        "granitemoeshared": {
            "intermediate_size": 40,
            "num_local_experts": 5,
            "shared_intermediate_size": 56,
            "attention_multiplier": 0.25,
        },
        "glm4_moe": {
            "intermediate_size": 72,
            "moe_intermediate_size": 40,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "head_dim": 24,
        },
    }[kind]
    return AutoConfig.for_model(kind, **(sizes | own | changes))


IMPORTS: dict[str, tuple[Family, str, dict[str, Any]]] = {
    "mixtral": (MIXTRAL, "mixtral", {"rope_theta": 5e5}),
    "mixtral, tied": (MIXTRAL, "mixtral", {"tie_word_embeddings": True, "num_experts_per_tok": 3, "head_dim": 24}),
    "qwen2": (QWEN2, "qwen2_moe", {}),
    "qwen2, sums to 1": (QWEN2, "qwen2_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3": (QWEN3, "qwen3_moe", {"decoder_sparse_step": 2}),
    "qwen3, sums to 1": (QWEN3, "qwen3_moe", {"norm_topk_prob": True}),
    "granite": (GRANITE, "granitemoeshared", {}),
    "granite, none shared": (GRANITE, "granitemoeshared", {"shared_intermediate_size": 0}),
    "glm4": (GLM4, "glm4_moe", {"attention_bias": True}),
    "glm4, groups": (
        GLM4,
        "glm4_moe",
        {
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "use_qk_norm": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 0,
        },
    ),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_what_theirs_computes_ours_computes_and_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    family, kind, changes = IMPORTS[name]
    result = import_(family, their_config(kind, **changes), tmp_path / "hf")
    print(f"{name}: {result.difference:.1e} where logits go up to {result.size:.1f}")
    assert result.difference <= TOLERANCE


@pytest.mark.parametrize(("family", "kind"), [(one, one.model_type) for one in (MIXTRAL, QWEN2, QWEN3, GRANITE, GLM4)])
def test_defaults_are_those_of_transformers(family: Any, kind: str) -> None:
    """What a config.json leaves out has the class's default, which is stated once more in our code."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    theirs = json.loads(config.to_json_string(use_diff=False)) | {"rope_theta": config.default_theta}
    for name, value in family.defaults.items():
        if name != "sliding_window":
            assert theirs.get(name, theirs.get(getattr(family, "aliases", {}).get(name))) == value, name


def test_a_weight_at_a_wrong_place_shows(tmp_path: Path) -> None:
    """The comparison sees a mapping error: gate and value of one expert exchanged."""
    run = moe_like()
    family = MIXTRAL

    class Wrong(type(family)):  # type: ignore[misc]
        def blocks(self, run: Any) -> Any:
            swap = {"w1": "w3", "w3": "w1"}
            blocks = []
            for block in super().blocks(run):
                parts = block.theirs.name.split(".") if block.theirs else []
                if "experts.3" in ".".join(parts) and parts[-2] in swap:
                    parts[-2] = swap[parts[-2]]
                    box = type(block.theirs)(".".join(parts), block.theirs.start, block.theirs.size)
                    block = block.with_side("theirs", box)
                blocks.append(block)
            return blocks

    assert export(Wrong(), run, tmp_path / "hf").difference > 100 * TOLERANCE


def test_top_1_is_refused_by_mixtral_and_would_not_be_the_same(tmp_path: Path) -> None:
    run = moe_like(moe_router_topk=1)
    refusal = MIXTRAL.why_not(run)
    assert refusal == "--moe-router-topk 1: in MixtralForCausalLM the weight of a token's only expert is 1"
    assert export(MIXTRAL, run, tmp_path / "hf").difference > 1000 * TOLERANCE


def test_a_doubled_matrix_and_half_a_gate_are_exact_in_every_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values = torch.randn(1000, dtype=torch.float32).to(dtype)
        assert torch.equal(torch.sigmoid(torch.zeros((), dtype=dtype)) * (2.0 * values), values)
