"""Mixtral: every layer has experts and nothing beside them; the chosen experts' weights sum to 1."""

from typing import Any, ClassVar

from megatron_moe.checkpoint.hf.families.abilities import Abilities
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.decoders import Decoder
from megatron_moe.checkpoint.hf.families.fields import Fields, check_window, common_config, common_flags
from megatron_moe.checkpoint.hf.families.parts import MIXTRAL_MLP
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout


class Mixtral(Decoder):
    """`MixtralForCausalLM`."""

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    abilities = Abilities(dense="none", renormalised=frozenset({True}))
    moe_block = "block_sparse_moe"
    expert_names = MIXTRAL_MLP
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "rope_theta": 1e6,
    }

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        return {
            **common_config(run),
            "head_dim": run.model.head_dim,
            "intermediate_size": run.expert_ffn_size,
            "num_local_experts": expert_layout(run).max_experts,
            "num_experts_per_tok": run.moe.moe_router_topk,
            "sliding_window": None,
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model."""
        fields = Fields(config, self.defaults)
        check_window(fields)
        return {
            "model": common_flags(fields),
            "moe": {
                "num_experts": (fields.whole("num_local_experts"),),
                # Of one expert the weight would be 1, which no flag makes it.
                "moe_router_topk": fields.whole("num_experts_per_tok", least=2),
                "moe_router_pre_softmax": False,
            },
        }


FAMILY = Mixtral()
