"""Qwen2 and Qwen2.5: dense, with biases on queries, keys and values."""

from typing import Any, ClassVar

from megatron_moe.checkpoint.hf.families.abilities import Abilities
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.decoders import Decoder
from megatron_moe.checkpoint.hf.families.fields import Fields, check_window, common_config, common_flags
from megatron_moe.config.run import RunConfig


class Qwen2(Decoder):
    """`Qwen2ForCausalLM`."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    abilities = Abilities(biases=frozenset({"qkv"}), own_head_dim=False)
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "rope_theta": 10000.0,
    }

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        return {
            **common_config(run),
            "intermediate_size": run.model.ffn_size,
            **NO_WINDOW,
            "max_window_layers": run.model.num_layers,
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model."""
        fields = Fields(config, self.defaults)
        check_windows(fields)
        return {"model": common_flags(fields, qkv_bias=True)}


NO_WINDOW = {"use_sliding_window": False, "sliding_window": None}


def check_windows(fields: Fields) -> None:
    """Refuse a window in any layer, unless no text is longer than it.

    `use_sliding_window` turns windows on, in the layers from `max_window_layers` on or as `layer_types` lists them.

    Raises:
        UserError: a layer looks back over a window, or is none of attention.
    """
    kinds, count = fields.get("layer_types"), fields.whole("num_hidden_layers")
    windows = fields.get("use_sliding_window") and fields.whole("max_window_layers", least=0) < count
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != count or not all(kind in known for kind in kinds):
            raise fields.refuse("layer_types", f"full_attention for each of the {count} layers")
        windows = "sliding_attention" in kinds
    check_window(fields, used=bool(windows))


FAMILY = Qwen2()
