"""Qwen3: dense, without biases, with a norm of every query and key head."""

from typing import Any, ClassVar

from megatron_moe.checkpoint.hf.families.abilities import Abilities
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.decoders import Decoder
from megatron_moe.checkpoint.hf.families.fields import Fields, common_config, common_flags
from megatron_moe.checkpoint.hf.families.qwen2 import NO_WINDOW, check_windows
from megatron_moe.config.run import RunConfig


class Qwen3(Decoder):
    """`Qwen3ForCausalLM`."""

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    abilities = Abilities(qk_norm=frozenset({True}))
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "rope_theta": 10000.0,
    }

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        return {
            **common_config(run),
            "head_dim": run.model.head_dim,
            "intermediate_size": run.model.ffn_size,
            "attention_bias": False,
            **NO_WINDOW,
            "max_window_layers": run.model.num_layers,
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model."""
        fields = Fields(config, self.defaults)
        check_windows(fields)
        fields.only("attention_bias", False, why="biases are in all linear layers, in query, key and value, or in none")
        return {"model": common_flags(fields, qk_norm=True)}


FAMILY = Qwen3()
