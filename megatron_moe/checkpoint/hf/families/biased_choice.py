"""What GLM-4-MoE and DeepSeek-V3 have in common: sigmoid scores with a bias on the choice, groups of experts, a factor
on their weights, a shared expert, dense layers first.

The shared expert is always there, and as wide as some experts together. A narrower one of ours is filled up with zeros,
which add nothing.
"""

from typing import Any

from megatron_moe.checkpoint.convert.blocks import Block, Box, only_theirs, rename
from megatron_moe.checkpoint.hf.families import parts
from megatron_moe.checkpoint.hf.families.decoders import Decoder
from megatron_moe.checkpoint.hf.families.fields import Fields, renormalised
from megatron_moe.checkpoint.hf.families.native import known_gate, sums_to_one
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout


class BiasedChoice(Decoder):
    """A decoder whose experts are so."""

    skips_later_layers = True

    def _experts(self, run: RunConfig, layer: int, theirs: str) -> list[Block]:
        blocks = parts.router(run, layer, f"{theirs}gate.weight")
        blocks += _choice_bias(run, layer, f"{theirs}gate.e_score_correction_bias")
        blocks += parts.experts_apart(run, layer, f"{theirs}experts.")
        return blocks + _padded_shared(run, layer, f"{theirs}shared_experts.")

    def fp32_names(self, run: RunConfig) -> frozenset[str]:
        """The biases on the choice."""
        layers = range(expert_layout(run).moe_layers[0] - 1, run.model.num_layers)
        return frozenset(f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in layers)


def choice_config(run: RunConfig) -> dict[str, Any]:
    """What config.json says of the MLPs, the experts and their choice; the way back is `choice_flags`."""
    model, layout, gate = run.model, expert_layout(run), known_gate(run)
    groups, used = gate.groups or (1, 1)
    return {
        "intermediate_size": model.ffn_size,
        "moe_intermediate_size": run.expert_ffn_size,
        "n_routed_experts": layout.max_experts,
        "n_shared_experts": _shared_experts(run),
        "num_experts_per_tok": gate.topk,
        "norm_topk_prob": sums_to_one(run),
        "routed_scaling_factor": gate.scale,
        "n_group": groups,
        "topk_group": used,
        "first_k_dense_replace": layout.moe_layers[0] - 1,
        # Layers that predict later tokens: none.
        "num_nextn_predict_layers": 0,
    }


def choice_flags(fields: Fields) -> dict[str, Any]:
    """The `moe` section.

    Raises:
        UserError: a field has a value that our model has no flag for.
    """
    first, layers = fields.whole("first_k_dense_replace", least=0), fields.whole("num_hidden_layers")
    if first >= layers:
        raise fields.refuse("first_k_dense_replace", f"less than num_hidden_layers {layers}")
    width, topk = fields.whole("moe_intermediate_size"), fields.whole("num_experts_per_tok")
    if not renormalised(fields) and topk > 1:
        raise fields.refuse("norm_topk_prob", "true: sigmoid weights of several experts are made to sum to 1")
    return {
        "num_experts": (fields.whole("n_routed_experts", least=2),),
        "moe_first_dense_layers": first,
        "moe_ffn_hidden_size": width,
        "moe_router_topk": topk,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": fields.number("routed_scaling_factor"),
        "moe_router_enable_expert_bias": True,
        "moe_shared_expert_intermediate_size": width * fields.whole("n_shared_experts"),
        **_group_flags(fields, topk),
    }


def _group_flags(fields: Fields, topk: int) -> dict[str, Any]:
    """Groups of experts, of which a token may use some: chosen by the best two scores of each.

    Raises:
        UserError: ours would choose them by more scores, or by fewer.
    """
    groups, used = fields.whole("n_group"), fields.whole("topk_group")
    if groups == used:
        return {}
    if groups < used:
        raise fields.refuse("topk_group", f"at most n_group {groups}")
    if topk != 2 * used:
        raise fields.refuse(
            "topk_group", f"num_experts_per_tok {topk} / 2: ours chooses groups by top-k / groups scores"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": used}


def _choice_bias(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    """The bias on the choice of experts; zeros where the router has none. `theirs` is its name."""
    experts = (parts.experts_in(run, layer),)
    if not known_gate(run).bias:
        return only_theirs(theirs, experts)
    return rename(f"{parts.our_layer(layer)}mlp.router.expert_bias", theirs, experts)


def _shared_experts(run: RunConfig) -> int:
    """How many experts' widths hold the shared one; at least one, which is zeros where ours has none."""
    path = parts.shared_path(run)
    return 1 if path is None else -(-path.width // run.expert_ffn_size)


def _padded_shared(run: RunConfig, layer: int, theirs: str) -> list[Block]:
    """The shared expert, filled up with zeros to a multiple of an expert's width.

    Args:
        run: the model.
        layer: its number from 0.
        theirs: what their names begin with.
    """
    hidden, width, path = run.model.hidden_size, _shared_experts(run) * run.expert_ffn_size, parts.shared_path(run)
    gate, up, down = (f"{theirs}{name}_proj.weight" for name in ("gate", "up", "down"))
    if path is None:
        return [
            *only_theirs(gate, (width, hidden)),
            *only_theirs(up, (width, hidden)),
            *only_theirs(down, (hidden, width)),
        ]
    own, rest = path.width, width - path.width
    ours = f"{parts.our_layer(layer)}{path.name}."
    blocks = [
        Block(Box(f"{ours}linear_fc1.weight", (0, 0), (own, hidden)), Box(gate, (0, 0), (own, hidden))),
        Block(Box(f"{ours}linear_fc1.weight", (own, 0), (own, hidden)), Box(up, (0, 0), (own, hidden))),
        Block(Box(f"{ours}linear_fc2.weight", (0, 0), (hidden, own)), Box(down, (0, 0), (hidden, own))),
    ]
    if rest:
        blocks += [Block(None, Box(name, (own, 0), (rest, hidden))) for name in (gate, up)]
        blocks.append(Block(None, Box(down, (0, own), (hidden, rest))))
    return blocks
