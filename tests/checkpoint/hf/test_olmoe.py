"""OLMoE against its class of transformers: the same logits, both ways, and the same bits there and back."""

from pathlib import Path
from typing import Any

import pytest
from transformers import OlmoeConfig

from megatron_moe.checkpoint.hf.families.olmoe import FAMILY
from megatron_moe.config.base import UserError
from tests.helpers.hf_parity import VOCABULARY, exported_alike, imported_alike, moe_like

NORM = {"qk_layernorm": True, "qk_layernorm_type": "projection"}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 6,
    "max_position_embeddings": 50,
}


pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize(
    "flags",
    [{"moe_router_topk": 2}, {"moe_router_topk": 1}, {"moe_router_topk": 3, "moe_router_pre_softmax": True}],
)
def test_our_model_as_theirs(flags: dict[str, Any], tmp_path: Path) -> None:
    run = moe_like(**NORM, **flags)
    exported_alike(FAMILY, run, tmp_path / "hf")


@pytest.mark.parametrize(
    "config",
    [
        {"num_experts_per_tok": 2, "num_key_value_heads": 2},
        {"num_experts_per_tok": 3, "norm_topk_prob": True, "rms_norm_eps": 1e-3},
    ],
)
def test_their_model_as_ours(config: dict[str, Any], tmp_path: Path) -> None:
    result = imported_alike(FAMILY, OlmoeConfig(**SIZES, **config), tmp_path / "hf")
    assert "model.layers.0.mlp.experts.5.down_proj.weight" in result.keys


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"qk_layernorm": True}, "--qk-layernorm-type head: OlmoeForCausalLM normalises all heads together"),
        ({}, "no --qk-layernorm: OlmoeForCausalLM has a norm on queries and keys"),
        ({**NORM, "moe_shared_expert_intermediate_size": 40}, "OlmoeForCausalLM has no shared expert"),
        ({**NORM, "moe_first_dense_layers": 1}, "dense layer 1: OlmoeForCausalLM has experts in every layer"),
    ],
)
def test_what_the_class_does_not_compute(flags: dict[str, Any], reason: str) -> None:
    why_not = FAMILY.why_not(moe_like(**flags))
    assert why_not is not None
    assert reason in why_not


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"clip_qkv": 8.0}, "clip_qkv 8.0: must be null (queries, keys and values are not clipped)"),
        ({"attention_bias": True}, "attention_bias true: must be false"),
    ],
)
def test_fields_that_are_not_read(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=r"^config\.json: ") as error:
        FAMILY.flags(config)
    assert message in str(error.value)


def test_defaults_are_those_of_transformers() -> None:
    written = OlmoeConfig().to_dict()
    for name, value in FAMILY.defaults.items():
        found = written["rope_parameters"]["rope_theta"] if name == "rope_theta" else written.get(name)
        if name == "num_experts":
            found = written.get(name, written.get("num_local_experts"))
        assert found == value, name
