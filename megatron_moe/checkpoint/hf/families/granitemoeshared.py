"""Granite-MoE with a shared expert: every layer has experts, their weights sum to 1, and beside them is an MLP without
a gate, or none.

The class also multiplies embeddings, attention, residuals and logits by constants. Ours has no such flags: the
constants must be those that do nothing.
"""

import math
from typing import Any, ClassVar

from megatron_moe.checkpoint.convert.blocks import Block, rename
from megatron_moe.checkpoint.hf.families import parts
from megatron_moe.checkpoint.hf.families.abilities import Abilities
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.decoders import Decoder
from megatron_moe.checkpoint.hf.families.fields import Fields, common_config, common_flags
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout

NEUTRAL = ("embedding_multiplier", "logits_scaling", "residual_multiplier")


class GraniteMoeShared(Decoder):
    """`GraniteMoeSharedForCausalLM`."""

    model_type = "granitemoeshared"
    architecture = "GraniteMoeSharedForCausalLM"
    abilities = Abilities(
        own_head_dim=False, dense="none", renormalised=frozenset({True}), shared=frozenset({"none", "plain"})
    )
    moe_block = "block_sparse_moe"
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 0,
        "rope_theta": 10000.0,
    }

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        shared = parts.shared_path(run)
        return {
            **common_config(run),
            "intermediate_size": run.expert_ffn_size,
            "shared_intermediate_size": 0 if shared is None else shared.width,
            "num_local_experts": expert_layout(run).max_experts,
            "num_experts_per_tok": run.moe.moe_router_topk,
            "attention_bias": False,
            "attention_multiplier": run.model.head_dim**-0.5,
            **dict.fromkeys(NEUTRAL, 1.0),
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model."""
        fields = Fields(config, self.defaults)
        fields.only("attention_bias", False, why="queries, keys and values may have biases, the output not alone")
        for name in NEUTRAL:
            fields.only(name, 1, 1.0, why="there is no flag for another factor")
        model = common_flags(fields)
        neutral = model["kv_channels"] ** -0.5
        if not math.isclose(fields.number("attention_multiplier"), neutral, rel_tol=1e-6):
            raise fields.refuse("attention_multiplier", f"{neutral:.9g}, 1 / sqrt(width of a head)")
        shared = fields.whole("shared_intermediate_size", least=0)
        return {
            "model": model,
            "moe": {
                "num_experts": (fields.whole("num_local_experts"),),
                # Of one expert the weight would be 1, which no flag makes it.
                "moe_router_topk": fields.whole("num_experts_per_tok", least=2),
                "moe_router_pre_softmax": False,
                "moe_shared_expert_intermediate_size": shared or None,
            },
        }

    def _experts(self, run: RunConfig, layer: int, theirs: str) -> list[Block]:
        blocks = [
            *parts.router(run, layer, f"{theirs}router.layer.weight"),
            *parts.experts_stacked(run, layer, f"{theirs}input_linear.weight", f"{theirs}output_linear.weight"),
        ]
        path = parts.shared_path(run)
        if path is None:
            return blocks
        ours, hidden = f"{parts.our_layer(layer)}{path.name}.", run.model.hidden_size
        shared = f"model.layers.{layer}.shared_mlp."
        return [
            *blocks,
            *rename(f"{ours}linear_fc1.weight", f"{shared}input_linear.weight", (2 * path.width, hidden)),
            *rename(f"{ours}linear_fc2.weight", f"{shared}output_linear.weight", (hidden, path.width)),
        ]


FAMILY = GraniteMoeShared()
