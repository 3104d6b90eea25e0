"""Where our weights are in a model of Megatron-LM before megatron-core, with DeepSpeed's experts (`classic.py`).

Shape legend: H = hidden size, F = width of an MLP, D = head width.
"""

from megatron_moe.checkpoint.convert.blocks import Block, Box, only_ours, place, rename, whole
from megatron_moe.checkpoint.foreign.classic import OUTPUT, POSITIONS, WORDS
from megatron_moe.checkpoint.hf.families.parts import norm, our_layer
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout


def classic_blocks(run: RunConfig, rows: int, *, version: float, expert_output_bias: bool) -> list[Block]:
    """The whole model.

    Args:
        run: the model.
        rows: of their embedding, padding included; at least as many as ours has, or fewer.
        version: `checkpoint_version` of the files.
        expert_output_bias: whether the second biases of experts, and of the MLP beside them, are added.
    """
    model = run.model
    blocks = _table("embedding.word_embeddings.weight", WORDS, run, rows)
    if model.position_embedding_type == "learned_absolute":
        blocks += rename(POSITIONS, POSITIONS, (model.max_positions, model.hidden_size))
    if model.untie_embeddings_and_output_weights:
        blocks += _table("output_layer.weight", OUTPUT, run, rows)
    layout = expert_layout(run)
    for layer in range(model.num_layers):
        ours, theirs = our_layer(layer), f"layers.{layer}."
        blocks += norm(model, f"{ours}input_layernorm", f"{theirs}input_layernorm", model.hidden_size)
        blocks += norm(model, f"{ours}pre_mlp_layernorm", f"{theirs}post_attention_layernorm", model.hidden_size)
        blocks += _attention(run, f"{ours}self_attention.", f"{theirs}self_attention.", version)
        if experts := layout.experts_in(layer + 1):
            blocks += _moe(run, f"{ours}mlp.", f"{theirs}mlp.", experts, expert_output_bias)
        else:
            blocks += _mlp(run, f"{ours}mlp.", f"{theirs}mlp.", model.ffn_size)
    return blocks + norm(model, "decoder.final_layernorm", "final_layernorm", model.hidden_size)


def _table(ours: str, theirs: str, run: RunConfig, rows: int) -> list[Block]:
    """A table over the vocabulary: the rows that both have; the rest of ours is padding."""
    padded, hidden = run.model.padded_vocab_size, run.model.hidden_size
    blocks = [Block(whole(ours, (min(rows, padded), hidden)), whole(theirs, (min(rows, padded), hidden)))]
    if padded > rows:
        blocks += [Block(Box(ours, (rows, 0), (padded - rows, hidden)), None)]
    return blocks


def _attention(run: RunConfig, ours: str, theirs: str, version: float) -> list[Block]:
    model = run.model
    width, hidden = model.num_attention_heads * model.head_dim, model.hidden_size
    rests: list[tuple[str, tuple[int, ...]]] = [("weight", (hidden,))]
    if not model.disable_bias_linear or model.add_qkv_bias:
        rests.append(("bias", ()))
    blocks = []
    for kind, rest in rests:
        one, other = f"{ours}linear_qkv.{kind}", f"{theirs}query_key_value.{kind}"
        rows = width + 2 * model.query_groups * model.head_dim
        blocks += rename(one, other, (rows, *rest)) if version >= 2 else _ordered_by_kind(run, one, other, rest)
    return blocks + _linear(run, f"{ours}linear_proj", f"{theirs}dense", (hidden, width))


def _ordered_by_kind(run: RunConfig, ours: str, theirs: str, rest: tuple[int, ...]) -> list[Block]:
    """[heads * 3 * D] of ours, every head with its query, key and value, from [3, heads * D]."""
    depth, zeros = run.model.head_dim, (0,) * len(rest)
    return [
        Block(
            Box(ours, ((head * 3 + kind) * depth, *zeros), (depth, *rest)),
            Box(theirs, (kind, head * depth, *zeros), (1, depth, *rest)),
        )
        for head in range(run.model.num_attention_heads)
        for kind in range(3)
    ]


def _linear(run: RunConfig, ours: str, theirs: str, shape: tuple[int, int], *, zero_bias: bool = False) -> list[Block]:
    """A linear layer; with `zero_bias` theirs never adds the bias that it has."""
    blocks = rename(f"{ours}.weight", f"{theirs}.weight", shape)
    if not run.model.disable_bias_linear:
        bias = f"{ours}.bias"
        blocks += only_ours(bias, shape[:1]) if zero_bias else rename(bias, f"{theirs}.bias", shape[:1])
    return blocks


def _mlp(run: RunConfig, ours: str, theirs: str, width: int, *, zero_bias: bool = False) -> list[Block]:
    hidden = run.model.hidden_size
    if run.model.swiglu:
        blocks = _gate_and_value(f"{ours}linear_fc1.weight", f"{theirs}dense_h_to_4h.weight", width, (hidden,))
        if not run.model.disable_bias_linear:
            blocks += _gate_and_value(f"{ours}linear_fc1.bias", f"{theirs}dense_h_to_4h.bias", width, ())
    else:
        blocks = _linear(run, f"{ours}linear_fc1", f"{theirs}dense_h_to_4h", (width, hidden))
    second = _linear(run, f"{ours}linear_fc2", f"{theirs}dense_4h_to_h", (hidden, width), zero_bias=zero_bias)
    return blocks + second


def _gate_and_value(ours: str, theirs: str, width: int, rest: tuple[int, ...]) -> list[Block]:
    """[2 * F] of ours from [2, F]."""
    zeros = (0,) * len(rest)
    return [
        Block(Box(ours, (half * width, *zeros), (width, *rest)), Box(theirs, (half, 0, *zeros), (1, width, *rest)))
        for half in range(2)
    ]


def _moe(run: RunConfig, ours: str, theirs: str, experts: int, expert_output_bias: bool) -> list[Block]:
    hidden, width, deepspeed = run.model.hidden_size, run.expert_ffn_size, f"{theirs}deepspeed_moe."
    zero = not expert_output_bias
    blocks = rename(f"{ours}router.weight", f"{deepspeed}gate.wg.weight", (experts, hidden))
    for expert in range(experts):
        names = f"{deepspeed}experts.deepspeed_experts.{expert}."
        for block in _mlp(run, f"{ours}experts.experts.", names, width, zero_bias=zero):
            assert block.ours is not None
            blocks += place([block], "ours", block.ours.name, expert)
    if run.moe.mlp_type == "residual":
        blocks += _mlp(run, f"{ours}residual.mlp.", f"{theirs}mlp.", width, zero_bias=zero)
        blocks += rename(f"{ours}residual.coefficient.weight", f"{theirs}coefficient.weight", (2, hidden))
        blocks += rename(f"{ours}residual.coefficient.bias", f"{theirs}coefficient.bias", (2,))
    if run.moe.use_expert_residual_network:
        for number in range(run.moe.expert_residual_layers):
            block_of_ours, block_of_theirs = f"{ours}expert_residual.{number}.", f"{deepspeed}expert_network.{number}."
            blocks += norm(run.model, f"{block_of_ours}norm", f"{block_of_theirs}norm", hidden)
            blocks += _linear(run, f"{block_of_ours}mlp.linear_fc1", f"{block_of_theirs}ff1", (4 * hidden, hidden))
            blocks += _linear(run, f"{block_of_ours}mlp.linear_fc2", f"{block_of_theirs}ff2", (hidden, 4 * hidden))
    return blocks
