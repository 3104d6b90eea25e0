"""Qwen3-MoE: a norm on every query and key head, nothing beside the experts, dense layers anywhere."""

from typing import Any, ClassVar

from megatron_moe.checkpoint.hf.families import parts
from megatron_moe.checkpoint.hf.families.abilities import Abilities
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.decoders import Decoder
from megatron_moe.checkpoint.hf.families.fields import (
    Fields,
    check_window,
    common_config,
    common_flags,
    renormalised,
    sparse_flags,
)
from megatron_moe.checkpoint.hf.families.native import sums_to_one
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout


class Qwen3Moe(Decoder):
    """`Qwen3MoeForCausalLM`."""

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    abilities = Abilities(qk_norm=frozenset({True}), dense="any", renormalised=frozenset({False, True}))
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "rope_theta": 10000.0,
    }
    aliases: ClassVar[dict[str, str]] = {"num_experts": "num_local_experts"}

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        layout = expert_layout(run)
        return {
            **common_config(run),
            "head_dim": run.model.head_dim,
            "intermediate_size": run.model.ffn_size,
            "moe_intermediate_size": run.expert_ffn_size,
            # The older name, which others read; transformers takes both.
            "num_experts": layout.max_experts,
            "num_experts_per_tok": run.moe.moe_router_topk,
            "norm_topk_prob": sums_to_one(run),
            "decoder_sparse_step": 1,
            "mlp_only_layers": parts.dense_layers(run),
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model."""
        fields = Fields(config, self.defaults, self.aliases)
        fields.only("attention_bias", False, why="queries, keys and values may have biases, the output not alone")
        check_window(fields, fields.flag("use_sliding_window"))
        return {
            "model": common_flags(fields, qk_norm=True),
            "moe": {
                "num_experts": (fields.whole("num_experts"),),
                "moe_ffn_hidden_size": fields.whole("moe_intermediate_size"),
                "moe_router_topk": fields.whole("num_experts_per_tok"),
                "moe_router_pre_softmax": not renormalised(fields),
                **sparse_flags(fields),
            },
        }


FAMILY = Qwen3Moe()
