"""GPT-2: dense, LayerNorm, biases everywhere, learned positions, GELU exact or by tanh.

Its linear layers are `Conv1D`s, whose matrices lie the other way round, and one matrix has all queries, then all keys,
then all values; ours has query, key and value of one head after the other.

Shape legend: H = hidden size, F = width of an MLP, D = head width.
"""

from typing import Any, ClassVar

from megatron_moe.checkpoint.convert.blocks import Block, rename, shift, split_qkv, turned
from megatron_moe.checkpoint.hf.families import parts
from megatron_moe.checkpoint.hf.families.abilities import Abilities, NoPlace
from megatron_moe.checkpoint.hf.families.base import HfConfig
from megatron_moe.checkpoint.hf.families.fields import LONGEST_SAMPLE, Fields, check_storage
from megatron_moe.checkpoint.hf.families.native import NativeFamily
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.run import RunConfig

PREFIX = "transformer."
OUTPUT = "lm_head.weight"
# Of transformers' activations.py, those that are one of ours; the first is what is written.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "gelu_tanh": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    "gelu": ("gelu", "gelu_python"),
    "squared_relu": ("relu2",),
}


class Gpt2(NativeFamily):
    """`GPT2LMHeadModel`."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    abilities = Abilities(
        norm="LayerNorm",
        activations=frozenset({"gelu", "gelu_tanh", "squared_relu"}),
        positions="learned_absolute",
        biases=frozenset({"all"}),
        own_head_dim=False,
    )
    defaults: ClassVar[dict[str, Any]] = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }

    def reasons(self, run: RunConfig) -> tuple[str, ...]:
        """Everything of the run's model that the class does not compute; empty where it is exact."""
        model, found = run.model, super().reasons(run)
        if model.query_groups != model.num_attention_heads:
            groups = f"--num-query-groups {model.query_groups}"
            found += (NoPlace(f"{groups}: {self.architecture} has a key and value for each of its heads"),)
        return found

    def config(self, run: RunConfig) -> dict[str, Any]:
        """What config.json says of the model."""
        model = run.model
        return {
            "vocab_size": model.vocab_size,
            "n_positions": model.max_positions,
            # Its older name, the one that llama.cpp's converter reads.
            "n_ctx": model.max_positions,
            "n_embd": model.hidden_size,
            "n_layer": model.num_layers,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_size,
            "activation_function": ACTIVATIONS[_activation(model)][0],
            "layer_norm_epsilon": model.norm_epsilon,
            "initializer_range": model.init_method_std,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
            "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
            "use_cache": True,
        }

    def flags(self, config: HfConfig) -> dict[str, dict[str, Any]]:
        """The sections that make the same model."""
        fields = Fields(config, self.defaults)
        check_storage(fields)
        fields.only("scale_attn_weights", True, why="scores are divided by the root of the head width")
        fields.only("scale_attn_by_inverse_layer_idx", False, why="all layers scale alike")
        fields.only("add_cross_attention", False, why="there is no encoder")
        names = [name for names in ACTIVATIONS.values() for name in names]
        fields.only("activation_function", *names, why="no other activation is known")
        activation = next(ours for ours, names in ACTIVATIONS.items() if fields.get("activation_function") in names)
        hidden, heads, positions = fields.whole("n_embd"), fields.whole("n_head"), fields.whole("n_positions")
        if hidden % heads:
            raise fields.refuse("n_embd", f"a multiple of n_head {heads}")
        model = {
            "num_layers": fields.whole("n_layer"),
            "hidden_size": hidden,
            "ffn_hidden_size": fields.whole_or("n_inner", 4 * hidden),
            "num_attention_heads": heads,
            "seq_length": min(positions, LONGEST_SAMPLE),
            "max_position_embeddings": positions,
            "position_embedding_type": "learned_absolute",
            "normalization": "LayerNorm",
            "norm_epsilon": fields.number("layer_norm_epsilon"),
            "gelu_tanh": activation == "gelu_tanh",
            "squared_relu": activation == "squared_relu",
            "untie_embeddings_and_output_weights": not fields.flag("tie_word_embeddings"),
            "vocab_size": fields.whole("vocab_size"),
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
        }
        return {"model": model}

    def stored_name(self, name: str) -> str | None:
        """The name in `blocks`, of files with and without `transformer.`; causal masks of older files are left out."""
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            return None
        return name if name.startswith(PREFIX) or name == OUTPUT else PREFIX + name

    def blocks(self, run: RunConfig) -> list[Block]:
        """Where every weight is."""
        model = run.model
        blocks = parts.embeddings(run, f"{PREFIX}wte.weight", OUTPUT)
        table = (model.max_positions, model.hidden_size)
        blocks += rename("embedding.position_embeddings.weight", f"{PREFIX}wpe.weight", table)
        for layer in range(model.num_layers):
            blocks += _layer(run, layer)
        return blocks + parts.norm(model, "decoder.final_layernorm", f"{PREFIX}ln_f", model.hidden_size)


def _activation(model: ModelConfig) -> str:
    return "gelu_tanh" if model.gelu_tanh else "squared_relu" if model.squared_relu else "gelu"


def _layer(run: RunConfig, layer: int) -> list[Block]:
    model, ours, theirs = run.model, parts.our_layer(layer), f"{PREFIX}h.{layer}."
    hidden, width = model.hidden_size, model.ffn_size
    return [
        *parts.layer_norms(run, layer, theirs, "ln_1", "ln_2"),
        *turned(_query_key_value(model, f"{ours}self_attention.linear_qkv.weight", f"{theirs}attn.c_attn.weight")),
        *_query_key_value(model, f"{ours}self_attention.linear_qkv.bias", f"{theirs}attn.c_attn.bias"),
        *_linear(f"{ours}self_attention.linear_proj", f"{theirs}attn.c_proj", hidden, hidden),
        *_linear(f"{ours}mlp.linear_fc1", f"{theirs}mlp.c_fc", width, hidden),
        *_linear(f"{ours}mlp.linear_fc2", f"{theirs}mlp.c_proj", hidden, width),
    ]


def _query_key_value(model: ModelConfig, ours: str, theirs: str) -> list[Block]:
    """Weights [3H, H], not yet turned, or biases [3H]."""
    hidden = model.hidden_size
    rest = (hidden,) if ours.endswith("weight") else ()
    heads = split_qkv(ours, ("query", "key", "value"), model.num_attention_heads, 1, model.head_dim, rest)
    blocks = []
    for place, name in enumerate(("query", "key", "value")):
        own = [block for block in heads if block.theirs is not None and block.theirs.name == name]
        blocks += shift(own, "theirs", theirs, 0, place * hidden)
    return blocks


def _linear(ours: str, theirs: str, rows: int, columns: int) -> list[Block]:
    """A layer with a bias; the matrix [rows, columns] is turned on their side."""
    weight = rename(f"{ours}.weight", f"{theirs}.weight", (rows, columns), transposed=True)
    return weight + rename(f"{ours}.bias", f"{theirs}.bias", (rows,))


FAMILY = Gpt2()
