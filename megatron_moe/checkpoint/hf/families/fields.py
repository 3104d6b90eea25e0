"""The fields of config.json that families share, both ways: read with their types checked, and written.

A value that our model has no flag for is refused with the field, the value and what would be read. Fields that the
class itself does not read are left alone: they change nothing there either.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.config.base import UserError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.run import RunConfig

SOURCE = "config.json"
# Llama 3.1's stretch of the rotary frequencies, of which our model has the factor only.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Training samples of a model that is read: as long as it takes, but not the length of a book.
LONGEST_SAMPLE = 4096
_LONGEST = 80

NOT_READ = frozenset(
    {
        # Training, generation and bookkeeping.
        "attention_dropout",
        "initializer_range",
        "use_cache",
        "output_router_logits",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "dtype",
        "transformers_version",
        "architectures",
        # Layers past the last one, which predict later tokens: `native.names_in_files` leaves them.
        "num_nextn_predict_layers",
    }
)
"""Fields of transformers' config classes that do not change what a model computes."""


class Fields:
    """A config.json, with the defaults of its class for what it leaves out.

    Args:
        config: what the file says.
        defaults: of the class, for the fields that are read.
        aliases: other names that the class takes for a field.
    """

    def __init__(self, config: HfConfig, defaults: Mapping[str, Any], aliases: Mapping[str, str] | None = None) -> None:
        self._config, self._defaults, self._aliases = config, defaults, aliases or {}

    def get(self, name: str) -> Any:
        """The value of a field, or its default; None where it has neither."""
        for known in (name, self._aliases.get(name, name)):
            if known in self._config:
                return self._config[known]
        return self._defaults.get(name)

    def refuse(self, name: str, legal: str) -> UserError:
        """The error for a field whose value is not read."""
        return UserError(f"{SOURCE}: {name} {shown(self.get(name))}: must be {legal}")

    def whole(self, name: str, least: int = 1) -> int:
        """A whole number.

        Raises:
            UserError: it is none, or less than `least`.
        """
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(name, f"a whole number of at least {least}")
        return value

    def whole_or(self, name: str, default: int, least: int = 1) -> int:
        """A whole number, or `default` where the field is null or left out."""
        return default if self.get(name) is None else self.whole(name, least)

    def number(self, name: str) -> float:
        """A finite number greater than 0."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
            raise self.refuse(name, "a number greater than 0")
        return float(value)

    def fraction(self, name: str) -> float:
        """A number from 0 to 1: a probability, the weight of a loss."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise self.refuse(name, "a number from 0 to 1")
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false."""
        value = self.get(name)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def only(self, name: str, *legal: Any, why: str) -> None:
        """Refuse every value but these.

        Raises:
            UserError: names the field, its value and `why` no other is read.
        """
        value = self.get(name)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in legal):
            raise self.refuse(name, f"{' or '.join(shown(one) for one in legal)} ({why})")

    def layers(self, name: str) -> tuple[int, ...]:
        """Numbers of layers, counted from 0; null is none."""
        value = self.get(name)
        if value is None:
            return ()
        count = self.whole("num_hidden_layers")
        if not isinstance(value, list) or not all(type(one) is int and 0 <= one < count for one in value):
            raise self.refuse(name, f"a list of layers from 0 to {count - 1}")
        return tuple(value)


def shown(value: Any) -> str:
    """A value as the file has it, on one line."""
    words = {None: "null", True: "true", False: "false"}
    known = value is None or isinstance(value, bool)
    text = words[value] if known else " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def common_flags(
    fields: Fields, *, qkv_bias: bool = False, qk_norm: bool = False, partial_rotary: float | None = None
) -> dict[str, Any]:
    """The `model` section of a Llama-like decoder: RMSNorm, SwiGLU, rotary positions, no biases but those named.

    Args:
        fields: the config.
        qkv_bias: queries, keys and values have biases.
        qk_norm: every query and key head is normalised.
        partial_rotary: the class's default share of rotated channels; None where it rotates all of them.

    Raises:
        UserError: a field has a value that our model has no flag for.
    """
    check_storage(fields)
    fields.only("hidden_act", "silu", "swish", why="--swiglu is the gated activation that there is")
    heads = fields.whole("num_attention_heads")
    hidden = fields.whole("hidden_size")
    if fields.get("head_dim") is None and hidden % heads:
        raise fields.refuse("hidden_size", f"a multiple of num_attention_heads {heads}")
    positions = fields.whole("max_position_embeddings")
    return {
        "num_layers": fields.whole("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": fields.whole("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": fields.whole_or("num_key_value_heads", heads),
        "kv_channels": fields.whole_or("head_dim", hidden // heads),
        "seq_length": min(positions, LONGEST_SAMPLE),
        "max_position_embeddings": positions,
        "normalization": "RMSNorm",
        "norm_epsilon": fields.number("rms_norm_eps"),
        "swiglu": True,
        "disable_bias_linear": True,
        "add_qkv_bias": qkv_bias,
        "untie_embeddings_and_output_weights": not fields.flag("tie_word_embeddings"),
        "qk_layernorm": qk_norm,
        "vocab_size": fields.whole("vocab_size"),
        # The classes have the first only, and off by default.
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        **rope_flags(fields, partial_rotary),
    }


def check_storage(fields: Fields) -> None:
    """Refuse what is stored or built in another way than the class by itself.

    Raises:
        UserError: the weights are quantised, or layers differ from each other.
    """
    if fields.get("quantization_config"):
        raise UserError(
            f"{SOURCE}: quantization_config {shown(fields.get('quantization_config'))}: must be left out; weights are "
            "read in fp32, bf16 and fp16, not quantised"
        )
    if fields.get("per_layer_config"):
        raise fields.refuse("per_layer_config", "left out: layers with sizes of their own are not read")


def sparse_flags(fields: Fields) -> dict[str, Any]:
    """Which layers have experts, by `mlp_only_layers` and `decoder_sparse_step` of the Qwen families.

    Raises:
        UserError: none has.
    """
    dense, step = fields.layers("mlp_only_layers"), fields.whole("decoder_sparse_step")
    count = fields.whole("num_hidden_layers")
    pattern = tuple(int(layer not in dense and (layer + 1) % step == 0) for layer in range(count))
    if not any(pattern):
        raise fields.refuse("mlp_only_layers", f"fewer: no layer has experts, with decoder_sparse_step {step}")
    return {} if all(pattern) else {"moe_layer_freq": pattern}


def renormalised(fields: Fields) -> bool:
    """Whether the chosen experts' weights are made to sum to 1 (`norm_topk_prob`).

    Raises:
        UserError: they are, and a token has one expert, whose weight no flag makes 1.
    """
    value = fields.flag("norm_topk_prob")
    if value and fields.whole("num_experts_per_tok") == 1:
        raise fields.refuse("norm_topk_prob", "false with num_experts_per_tok 1, or the only expert's weight is 1")
    return value


def check_window(fields: Fields, used: bool = True) -> None:
    """Refuse attention that looks back over a window, unless no text is longer than it.

    Args:
        fields: the config.
        used: whether the class looks at `sliding_window`, as `use_sliding_window` decides in some.
    """
    window = fields.get("sliding_window")
    if not used or window is None:
        return
    if fields.whole("sliding_window", least=0) < fields.whole("max_position_embeddings"):
        raise fields.refuse("sliding_window", "null, or not less than max_position_embeddings: attention sees all text")


def rope_flags(fields: Fields, partial_rotary: float | None = None) -> dict[str, Any]:
    """The flags of rotary positions, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.

    Raises:
        UserError: the rotation is of a kind that our model has not.
    """
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given = fields.get(name) or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        raise fields.refuse(name, "one mapping for all layers")
    rope = {key: value for key, value in given.items() if value is not None}

    def value_of(key: str, default: Any) -> Any:
        outside = fields.get(key)
        return rope.get(key, default if outside is None else outside)

    theta = value_of("rope_theta", None)
    known = isinstance(theta, int | float) and not isinstance(theta, bool)
    if not known or not 1 <= theta < math.inf or theta != int(theta):
        raise UserError(f"{SOURCE}: rope_theta {shown(theta)}: must be a whole number of at least 1 (--rotary-base)")
    flags: dict[str, Any] = {"position_embedding_type": "rope", "rotary_base": int(theta)}
    if partial_rotary is not None:
        share = value_of("partial_rotary_factor", partial_rotary)
        if not isinstance(share, int | float) or not 0.0 < share <= 1.0:
            raise UserError(f"{SOURCE}: partial_rotary_factor {shown(share)}: must be in (0, 1]")
        flags["rotary_percent"] = float(share)
    return {**flags, **_scaling_flags(name, rope)}


def _scaling_flags(name: str, rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    if kind != "llama3":
        raise UserError(f"{SOURCE}: {name}.rope_type {shown(kind)}: must be default or llama3 (--use-rope-scaling)")
    for key, value in LLAMA3_ROPE.items():
        if rope.get(key) != value:
            raise UserError(f"{SOURCE}: {name}.{key} {shown(rope.get(key))}: must be {value:g}, as Llama 3.1 has it")
    factor = rope.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1.0 <= factor < math.inf:
        raise UserError(f"{SOURCE}: {name}.factor {shown(factor)}: must be a number of at least 1")
    return {"use_rope_scaling": True, "rope_scaling_factor": float(factor)}


def common_config(run: RunConfig, *, partial_rotary: bool = False) -> dict[str, Any]:
    """What config.json says of a Llama-like decoder; the way back is `common_flags`.

    `partial_rotary`: the class rotates a share of the channels, which is written whatever it is.
    """
    model = run.model
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_method_std,
        "attention_dropout": 0.0,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        **rope_config(model, partial_rotary=partial_rotary),
    }


def rope_config(model: ModelConfig, *, partial_rotary: bool = False) -> dict[str, Any]:
    """Rotary positions by the names of transformers 5, and by the older ones that other programs still read."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(model.rotary_base)}
    older: dict[str, Any] = {"rope_theta": float(model.rotary_base)}
    if model.use_rope_scaling:
        scaling = {"rope_type": "llama3", "factor": model.rope_scaling_factor, **LLAMA3_ROPE}
        rope |= scaling
        older["rope_scaling"] = scaling
    if partial_rotary:
        rope["partial_rotary_factor"] = older["partial_rotary_factor"] = model.rotary_percent
    return {"rope_parameters": rope, **older}
