"""GLM-4-MoE: sigmoid scores with a bias on the choice, groups of experts, a factor on their weights, a shared expert,
dense layers first; heads that may be normalised and rotated in part."""

from typing import Any, ClassVar

from megatron_moe.checkpoint.hf.families.abilities import Abilities
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.biased_choice import BiasedChoice, choice_config, choice_flags
from megatron_moe.checkpoint.hf.families.fields import Fields, common_config, common_flags
from megatron_moe.config.run import RunConfig


class Glm4Moe(BiasedChoice):
    """`Glm4MoeForCausalLM`."""

    model_type = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    abilities = Abilities(
        partial_rotary=True,
        biases=frozenset({"none", "qkv"}),
        qk_norm=frozenset({False, True}),
        dense="first",
        score="sigmoid",
        renormalised=frozenset({False, True}),
        scale=True,
        groups=True,
        bias=True,
        shared=frozenset({"none", "plain"}),
    )
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "rope_theta": 10000.0,
    }
    aliases: ClassVar[dict[str, str]] = {"n_routed_experts": "num_local_experts"}

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        return {
            **common_config(run, partial_rotary=True),
            **choice_config(run),
            "head_dim": run.model.head_dim,
            "use_qk_norm": run.model.qk_layernorm,
            "attention_bias": run.model.add_qkv_bias,
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model; layers that predict later tokens are left out."""
        fields = Fields(config, self.defaults, self.aliases)
        bias, norm = fields.flag("attention_bias"), fields.flag("use_qk_norm")
        model = common_flags(fields, qkv_bias=bias, qk_norm=norm, partial_rotary=0.5)
        return {"model": model, "moe": choice_flags(fields)}


FAMILY = Glm4Moe()
