"""Llama: dense, SwiGLU, RMSNorm, rotary positions; biases in all linear layers or in none. Mistral is the same class
of models with a window, which is read where no text is longer than it."""

from typing import Any, ClassVar

from megatron_moe.checkpoint.hf.families.abilities import Abilities, NoPlace
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.decoders import Decoder
from megatron_moe.checkpoint.hf.families.fields import Fields, check_window, common_config, common_flags
from megatron_moe.config.run import RunConfig


class Llama(Decoder):
    """`LlamaForCausalLM`."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    abilities = Abilities(biases=frozenset({"none", "all"}))
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
        "mlp_bias": False,
        "rope_theta": 10000.0,
    }

    def reasons(self, run: RunConfig) -> tuple[str, ...]:
        """Everything of the run's model that the class does not compute; empty where it is exact."""
        hidden, heads = run.model.hidden_size, run.model.num_attention_heads
        found = super().reasons(run)
        if hidden % heads:
            # LlamaConfig.validate_architecture, whatever head_dim says.
            multiple = f"{self.architecture} takes a multiple of its {heads} attention heads"
            found += (NoPlace(f"--hidden-size {hidden}: {multiple}"),)
        return found

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        bias = not run.model.disable_bias_linear
        return {
            **common_config(run),
            "head_dim": run.model.head_dim,
            "intermediate_size": run.model.ffn_size,
            "attention_bias": bias,
            "mlp_bias": bias,
            "pretraining_tp": 1,
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model."""
        fields = Fields(config, self.defaults)
        bias = fields.flag("attention_bias")
        fields.only("mlp_bias", bias, why="as attention_bias: biases are in all linear layers or in none")
        return {"model": common_flags(fields) | {"disable_bias_linear": not bias}}


class Mistral(Decoder):
    """`MistralForCausalLM`, to be read; Llama holds all that it does without a window."""

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    abilities = Abilities()
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
    }

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        sizes = {"head_dim": run.model.head_dim, "intermediate_size": run.model.ffn_size}
        return {**common_config(run), **sizes, "sliding_window": None}

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model."""
        fields = Fields(config, self.defaults)
        check_window(fields)
        return {"model": common_flags(fields)}


FAMILY = Llama()
MISTRAL = Mistral()
