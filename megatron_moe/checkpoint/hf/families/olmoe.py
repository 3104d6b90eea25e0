"""OLMoE: experts in every layer and nothing beside them, a norm over all query heads and one over all key heads."""

from typing import Any, ClassVar

from megatron_moe.checkpoint.hf.families.abilities import Abilities
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.decoders import Decoder
from megatron_moe.checkpoint.hf.families.fields import Fields, common_config, common_flags, renormalised
from megatron_moe.checkpoint.hf.families.native import sums_to_one
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout


class Olmoe(Decoder):
    """`OlmoeForCausalLM`."""

    model_type = "olmoe"
    architecture = "OlmoeForCausalLM"
    abilities = Abilities(
        qk_norm=frozenset({True}),
        qk_norm_type="projection",
        own_head_dim=False,
        dense="none",
        renormalised=frozenset({False, True}),
    )
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
        "rope_theta": 10000.0,
    }
    aliases: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        return {
            **common_config(run),
            "intermediate_size": run.expert_ffn_size,
            "num_experts": expert_layout(run).max_experts,
            "num_experts_per_tok": run.moe.moe_router_topk,
            "norm_topk_prob": sums_to_one(run),
            "attention_bias": False,
            "clip_qkv": None,
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model."""
        fields = Fields(config, self.defaults, self.aliases)
        fields.only("attention_bias", False, why="biases are in all linear layers, in query, key and value, or in none")
        fields.only("clip_qkv", None, why="queries, keys and values are not clipped")
        return {
            "model": common_flags(fields, qk_norm=True) | {"qk_layernorm_type": "projection"},
            "moe": {
                "num_experts": (fields.whole("num_experts"),),
                "moe_router_topk": fields.whole("num_experts_per_tok"),
                "moe_router_pre_softmax": not renormalised(fields),
            },
        }


FAMILY = Olmoe()
