"""Where the parts of a decoder that families share are on both sides: embedding, norms, attention, MLPs, experts.

Each function returns the blocks of one part of one layer; a family puts them together with the names of its own parts.
Layers are counted from 0 here, as in the names of tensors.

Shape legend: H = hidden size, F = width of an MLP, E = experts, V = vocabulary, D = head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_moe.checkpoint.convert.blocks import (
    Block,
    cut_rows,
    only_ours,
    place,
    rename,
    scaled,
    split_qkv,
    split_rows,
)
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout
from megatron_moe.moe.margins import beta_at

type LayerBlocks = Callable[[RunConfig, int], list[Block]]
"""The blocks of one layer."""


@dataclass(frozen=True, slots=True)
class GatedNames:
    """What a family calls the three matrices of a SwiGLU MLP, without `.weight`."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


LLAMA_MLP = GatedNames()
MIXTRAL_MLP = GatedNames("w1", "w3", "w2")


@dataclass(frozen=True, slots=True)
class SharedPath:
    """The MLP that every token takes beside the routed experts."""

    name: str
    """Of its module within our layer: `mlp.shared_experts` or `mlp.residual.mlp`."""
    width: int
    gated: bool
    """Whether a sigmoid of the token weighs it."""


def our_layer(layer: int) -> str:
    """The beginning of the names of a layer's tensors on our side."""
    return f"decoder.layers.{layer}."


def is_moe(run: RunConfig, layer: int) -> bool:
    """Whether a layer, counted from 0, has experts."""
    return experts_in(run, layer) > 0


def experts_in(run: RunConfig, layer: int) -> int:
    """Experts of a layer, counted from 0; 0 in a dense one."""
    return expert_layout(run).experts_in(layer + 1)


def dense_layers(run: RunConfig) -> list[int]:
    """The layers without experts, counted from 0."""
    return [layer for layer in range(run.model.num_layers) if not is_moe(run, layer)]


def shared_path(run: RunConfig) -> SharedPath | None:
    """The path beside the experts; a residual MLP that is added is one, as wide as an expert.

    A residual MLP that a learned coefficient weighs against the experts is none: no class of transformers has it.
    """
    moe = run.moe
    if moe.moe_shared_expert_intermediate_size is not None:
        return SharedPath("mlp.shared_experts", moe.moe_shared_expert_intermediate_size, moe.moe_shared_expert_gate)
    if moe.mlp_type == "residual" and moe.residual_combine == "add":
        return SharedPath("mlp.residual.mlp", run.expert_ffn_size, gated=False)
    return None


def decoder(run: RunConfig, layer_blocks: LayerBlocks, model: str = "model.") -> list[Block]:
    """A whole decoder with Llama's names for what is outside of the layers.

    Args:
        run: the model.
        layer_blocks: everything in a layer.
        model: what their names begin with, apart from the output layer's.
    """
    blocks = embeddings(run, f"{model}embed_tokens.weight", "lm_head.weight")
    for layer in range(run.model.num_layers):
        blocks += layer_blocks(run, layer)
    return blocks + norm(run.model, "decoder.final_layernorm", f"{model}norm", run.model.hidden_size)


def embeddings(run: RunConfig, table: str, output: str) -> list[Block]:
    """The embedding without the rows that only pad it, and the output layer if it has weights of its own.

    A tied model has no output layer on disk, on either side.
    """
    model = run.model
    assert model.vocab_size is not None
    sizes = (model.padded_vocab_size, model.vocab_size, (model.hidden_size,))
    blocks = cut_rows("embedding.word_embeddings.weight", table, *sizes)
    if model.untie_embeddings_and_output_weights:
        blocks += cut_rows("output_layer.weight", output, *sizes)
    return blocks


def norm(model: ModelConfig, ours: str, theirs: str, width: int) -> list[Block]:
    """A norm's weight, and its bias where it is a LayerNorm. Names without `.weight`."""
    blocks = rename(f"{ours}.weight", f"{theirs}.weight", (width,))
    if model.normalization == "LayerNorm":
        blocks += rename(f"{ours}.bias", f"{theirs}.bias", (width,))
    return blocks


def layer_norms(
    run: RunConfig,
    layer: int,
    theirs: str,
    attention: str = "input_layernorm",
    mlp: str = "post_attention_layernorm",
) -> list[Block]:
    """The two norms of a layer, the one before the attention and the one before the MLP.

    Args:
        run: the model.
        layer: its number from 0.
        theirs: what their names in this layer begin with, as `model.layers.0.`.
        attention, mlp: their names.
    """
    ours, model = our_layer(layer), run.model
    return [
        *norm(model, f"{ours}input_layernorm", f"{theirs}{attention}", model.hidden_size),
        *norm(model, f"{ours}pre_mlp_layernorm", f"{theirs}{mlp}", model.hidden_size),
    ]


def attention(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    """Self-attention with Llama's names: q_proj, k_proj, v_proj, o_proj, their biases, q_norm and k_norm.

    Args:
        run: the model.
        layer: its number from 0.
        theirs: what their names begin with, as `model.layers.0.self_attn.`.
    """
    model, ours = run.model, f"{our_layer(layer)}self_attention."
    groups, per_group = model.query_groups, model.num_attention_heads // model.query_groups
    parts, heads = ("q_proj", "k_proj", "v_proj"), (groups, per_group, model.head_dim)

    def qkv(kind: str, rest: tuple[int, ...]) -> list[Block]:
        query, key, value = (f"{theirs}{part}.{kind}" for part in parts)
        return split_qkv(f"{ours}linear_qkv.{kind}", (query, key, value), *heads, rest)

    blocks = qkv("weight", (model.hidden_size,))
    if model.add_qkv_bias or not model.disable_bias_linear:
        blocks += qkv("bias", ())
    width = model.num_attention_heads * model.head_dim
    blocks += rename(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", (model.hidden_size, width))
    if not model.disable_bias_linear:
        blocks += rename(f"{ours}linear_proj.bias", f"{theirs}o_proj.bias", (model.hidden_size,))
    if model.qk_layernorm:
        alone = model.qk_layernorm_type == "head"
        for name, count in (("q", model.num_attention_heads), ("k", groups)):
            norm_width = model.head_dim * (1 if alone else count)
            blocks += norm(model, f"{ours}{name}_layernorm", f"{theirs}{name}_norm", norm_width)
    return blocks


def gated_mlp(
    ours: str,
    theirs: str,
    hidden: int,
    width: int,
    names: GatedNames = LLAMA_MLP,
    *,
    bias: bool = False,
    down_scale: float = 1.0,
) -> list[Block]:
    """A SwiGLU MLP: ours has gate and value in one matrix, theirs apart.

    Args:
        ours: what our names begin with, up to `linear_fc1`.
        theirs: what theirs begin with.
        hidden: H.
        width: F.
        names: of their matrices.
        bias: whether the layers have biases.
        down_scale: theirs / ours of the second matrix.
    """
    first = (f"{theirs}{names.gate}", f"{theirs}{names.up}")
    second = f"{theirs}{names.down}"
    blocks = split_rows(f"{ours}linear_fc1.weight", [f"{name}.weight" for name in first], (width, width), (hidden,))
    blocks += scaled(rename(f"{ours}linear_fc2.weight", f"{second}.weight", (hidden, width)), down_scale)
    if bias:
        blocks += split_rows(f"{ours}linear_fc1.bias", [f"{name}.bias" for name in first], (width, width))
        blocks += scaled(rename(f"{ours}linear_fc2.bias", f"{second}.bias", (hidden,)), down_scale)
    return blocks


def dense_mlp(run: RunConfig, layer: int, theirs: str, names: GatedNames = LLAMA_MLP) -> list[Block]:
    """The SwiGLU MLP of a dense layer; `theirs` is what their names begin with, as `model.layers.0.mlp.`."""
    model = run.model
    ours, bias = f"{our_layer(layer)}mlp.", not model.disable_bias_linear
    return gated_mlp(ours, theirs, model.hidden_size, model.ffn_size, names, bias=bias)


def experts_apart(run: RunConfig, layer: int, theirs: str, names: GatedNames = LLAMA_MLP) -> list[Block]:
    """Experts without biases that have a name each on their side: `{theirs}{number}.{gate}.weight`."""
    hidden, width = run.model.hidden_size, run.expert_ffn_size
    ours = f"{our_layer(layer)}mlp.experts.experts."
    blocks = []
    for expert in range(experts_in(run, layer)):
        parts = gated_mlp("", f"{theirs}{expert}.", hidden, width, names)
        for name in ("linear_fc1.weight", "linear_fc2.weight"):
            own = [part for part in parts if part.ours is not None and part.ours.name == name]
            blocks += place(own, "ours", ours + name, expert)
    return blocks


def experts_stacked(run: RunConfig, layer: int, first: str, second: str) -> list[Block]:
    """Experts without biases that lie in two tensors on their side too, [E, 2F, H] with the gates first and
    [E, H, F]: `first` and `second` are their names."""
    hidden, width, count = run.model.hidden_size, run.expert_ffn_size, experts_in(run, layer)
    ours = f"{our_layer(layer)}mlp.experts.experts."
    return [
        *rename(f"{ours}linear_fc1.weight", first, (count, 2 * width, hidden)),
        *rename(f"{ours}linear_fc2.weight", second, (count, hidden, width)),
    ]


def router(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    """The gate, [E, H]; `theirs` is its whole name.

    A large-margin router also keeps the weight of its plain logit, which every training step sets anew.
    """
    ours = f"{our_layer(layer)}mlp.router."
    blocks = rename(f"{ours}weight", theirs, (experts_in(run, layer), run.model.hidden_size))
    if run.moe.router == "large-margin":
        flags = run.routing
        start = beta_at(0, flags.router_margin_beta, flags.router_margin_beta_decay, flags.router_margin_beta_min)
        blocks += only_ours(f"{ours}margin_beta", (1,), fill=start)
    return blocks
