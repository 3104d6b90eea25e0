"""Qwen2-MoE, the class that holds most: weights that sum to 1 or not, one expert a token or more, dense layers
anywhere, biases on queries, keys and values, and a shared expert with a sigmoid gate.

It always has that shared expert. Without a gate ours is there with a gate that makes 1/2 of it, and a second matrix
twice as large: exact in every binary format. Without any, a narrow one of zeros adds nothing.

Two habits of programs that serve it decide what is written where our model has nothing (tests/serving):
- vLLM's class has biases of queries, keys and values whatever `qkv_bias` says, and leaves them as memory was when the
  files lack them. So they are always there, zeros if need be. Files without them are read all the same.
- llama.cpp computes sigmoid(x) as silu(x) / x, which is no number at 0. So a gate that makes 1/2 is not quite zeros.
"""

from typing import Any, ClassVar

from megatron_moe.checkpoint.convert.blocks import Block, only_theirs, rename
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

NO_SHARED_WIDTH = 32
"""Width of the shared expert that a model without one gets: the rows of llama.cpp's quantised formats have at least
that many numbers."""
HALF_GATE = 2.0**-60
"""Weights of a gate that makes exactly 1/2: its logit is some 1e-15, and sigmoid rounds to 1/2 below 1e-7. bfloat16 and
float32 hold it; in float16 it is 0."""


class Qwen2Moe(Decoder):
    """`Qwen2MoeForCausalLM`."""

    model_type = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    abilities = Abilities(
        biases=frozenset({"none", "qkv"}),
        dense="any",
        renormalised=frozenset({False, True}),
        shared=frozenset({"none", "plain", "gated"}),
    )
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "norm_topk_prob": False,
        "qkv_bias": True,
        "rope_theta": 10000.0,
    }

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        model, shared = run.model, parts.shared_path(run)
        own_width = model.head_dim * model.num_attention_heads != model.hidden_size
        return {
            **common_config(run),
            # The class takes it, but does not name it among its fields.
            **({"head_dim": model.head_dim} if own_width else {}),
            "intermediate_size": model.ffn_size,
            "moe_intermediate_size": run.expert_ffn_size,
            "shared_expert_intermediate_size": NO_SHARED_WIDTH if shared is None else shared.width,
            "num_experts": expert_layout(run).max_experts,
            "num_experts_per_tok": run.moe.moe_router_topk,
            "norm_topk_prob": sums_to_one(run),
            "decoder_sparse_step": 1,
            "mlp_only_layers": parts.dense_layers(run),
            "qkv_bias": True,
            "use_sliding_window": False,
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model."""
        fields = Fields(config, self.defaults)
        sliding = fields.flag("use_sliding_window")
        check_window(fields, sliding)
        kinds = fields.get("layer_types") or []
        if not sliding and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
            raise fields.refuse("layer_types", "full_attention in every layer")
        return {
            "model": common_flags(fields, qkv_bias=fields.flag("qkv_bias")),
            "moe": {
                "num_experts": (fields.whole("num_experts"),),
                "moe_ffn_hidden_size": fields.whole("moe_intermediate_size"),
                "moe_router_topk": fields.whole("num_experts_per_tok"),
                "moe_router_pre_softmax": not renormalised(fields),
                "moe_shared_expert_intermediate_size": fields.whole("shared_expert_intermediate_size"),
                "moe_shared_expert_gate": True,
                **sparse_flags(fields),
            },
        }

    def _attention(self, run: RunConfig, layer: int, theirs: str) -> list[Block]:
        blocks = super()._attention(run, layer, theirs)
        return blocks if run.model.add_qkv_bias else blocks + _no_biases(run, theirs)

    def _experts(self, run: RunConfig, layer: int, theirs: str) -> list[Block]:
        return super()._experts(run, layer, theirs) + _shared(run, layer, theirs)


def _no_biases(run: RunConfig, theirs: str) -> list[Block]:
    model = run.model
    heads = {"q": model.num_attention_heads, "k": model.query_groups, "v": model.query_groups}
    return [
        block
        for name, count in heads.items()
        for block in only_theirs(f"{theirs}{name}_proj.bias", (count * model.head_dim,), implied=True)
    ]


def _shared(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    hidden, path = run.model.hidden_size, parts.shared_path(run)
    expert, gate = f"{theirs}shared_expert.", f"{theirs}shared_expert_gate.weight"
    if path is None:
        return [
            *only_theirs(f"{expert}gate_proj.weight", (NO_SHARED_WIDTH, hidden)),
            *only_theirs(f"{expert}up_proj.weight", (NO_SHARED_WIDTH, hidden)),
            *only_theirs(f"{expert}down_proj.weight", (hidden, NO_SHARED_WIDTH)),
            *only_theirs(gate, (1, hidden), HALF_GATE),
        ]
    ours = f"{parts.our_layer(layer)}{path.name}."
    if path.gated:
        return [
            *parts.gated_mlp(ours, expert, hidden, path.width),
            *rename(f"{ours}gate_weight", gate, (1, hidden)),
        ]
    half = only_theirs(gate, (1, hidden), HALF_GATE)
    return [*parts.gated_mlp(ours, expert, hidden, path.width, down_scale=2.0), *half]


FAMILY = Qwen2Moe()
