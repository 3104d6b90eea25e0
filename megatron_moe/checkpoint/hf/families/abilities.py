"""What a class of transformers can compute, and whether that is enough for a run.

A family names its abilities; `reasons` goes through everything that changes what a model computes outside of training
and says what the class lacks. What decides is the function: a router that differs from plain top-k in training only is
plain top-k here, and a residual MLP that is added is a shared expert.

Every flag of the three sections is in one of the two lists at the end of the file. A new flag must be put into one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.checkpoint.hf.families.parts import SharedPath, shared_path
from megatron_moe.config.base import flag_name, format_value
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.routing import RoutingConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout

type Biases = Literal["none", "qkv", "all"]
type Dense = Literal["none", "first", "any", "all"]
type Activation = Literal["swiglu", "gelu", "gelu_tanh", "squared_relu"]


class NoPlace(str):
    """A reason that is one of weights, not of the function alone: the class has no place for some of ours, or places
    that ours do not fill."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Gate:
    """How a learned router chooses and weighs experts outside of training."""

    score: Literal["softmax", "sigmoid"]
    topk: int
    renormalised: bool
    """Whether the chosen experts' weights sum to 1."""
    scale: float
    groups: tuple[int, int] | None
    """Groups of experts, and how many of them a token may use; None where it may use all."""
    bias: bool
    """Whether a bias per expert decides on the choice, but not on the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Abilities:
    """What a class computes."""

    norm: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    activations: frozenset[Activation] = frozenset({"swiglu"})
    positions: Literal["rope", "learned_absolute"] = "rope"
    partial_rotary: bool = False
    """Rotates a share of a head's channels, if so asked."""
    biases: frozenset[Biases] = frozenset({"none"})
    """Linear layers with biases: none, those of query, key and value, or all."""
    qk_norm: frozenset[bool] = frozenset({False})
    """Whether it can do without, and with, a norm on queries and keys."""
    qk_norm_type: Literal["head", "projection"] = "head"
    """What that takes: a head, or all heads of a token as one vector."""
    latent: bool = False
    """Keys and values are made from a small vector of a token (DeepSeek's multi-head latent attention)."""
    own_head_dim: bool = True
    """Heads may have a width other than hidden size / heads."""
    untied: frozenset[bool] = frozenset({False, True})
    """Whether the output layer may be tied to the embedding, and may have weights of its own."""
    dense: Dense = "all"
    """Which layers may be dense; `all`: the class has no experts."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalised: frozenset[bool] = frozenset()
    """Whether it can leave the chosen weights as they are, and make them sum to 1; with one expert a token there is
    only the first."""
    scale: bool = False
    """Multiplies the weights by a factor."""
    groups: bool = False
    """Limits a token to some groups of experts, chosen by the sum of the two best scores in each."""
    bias: bool = False
    """Has a bias on the choice."""
    shared: frozenset[Literal["none", "plain", "gated"]] = frozenset({"none"})
    """A path beside the experts: none, one that is added, one that a sigmoid of the token weighs."""


def reasons(run: RunConfig, can: Abilities, what: str) -> tuple[str, ...]:
    """Why a class with these abilities does not compute what the run's model computes; empty where it does.

    Args:
        run: the model.
        can: what the class can do.
        what: the class, as messages name it.
    """
    return (*_model_reasons(run, can, what), *_expert_reasons(run, can, what))


def _model_reasons(run: RunConfig, can: Abilities, what: str) -> Iterator[str]:
    model = run.model
    if model.normalization != can.norm:
        yield NoPlace(f"--normalization {model.normalization}: {what} has {can.norm}")
    if (activation := _activation(model)) not in can.activations:
        named = "GELU (the default)" if activation == "gelu" else flag_name(activation)
        reason = f"{named}: {what} has {' or '.join(sorted(can.activations))}"
        yield NoPlace(reason) if "swiglu" in {activation, *can.activations} else reason
    if model.position_embedding_type != can.positions:
        table = "learned_absolute" in (model.position_embedding_type, can.positions)
        reason = f"--position-embedding-type {model.position_embedding_type}: {what} has {can.positions}"
        yield NoPlace(reason) if table else reason
    elif model.rotary_percent != 1.0 and not can.partial_rotary:
        yield f"--rotary-percent {model.rotary_percent:g}: {what} rotates all channels"
    if (biases := _biases(model)) not in can.biases:
        named = {
            "none": "--disable-bias-linear without --add-qkv-bias",
            "qkv": "--add-qkv-bias",
            "all": "biases in all linear layers (no --disable-bias-linear)",
        }[biases]
        words = {"none": "none", "qkv": "those of query, key and value", "all": "all of them"}
        yield NoPlace(f"{named}: {what} has {' or '.join(words[one] for one in words if one in can.biases)}")
    if model.qk_layernorm not in can.qk_norm:
        flag = "--qk-layernorm" if model.qk_layernorm else "no --qk-layernorm"
        yield NoPlace(f"{flag}: {what} has {'no norm' if model.qk_layernorm else 'a norm'} on queries and keys")
    elif model.qk_layernorm and model.qk_layernorm_type != can.qk_norm_type:
        has = "every head by itself" if can.qk_norm_type == "head" else "all heads together"
        yield NoPlace(f"--qk-layernorm-type {model.qk_layernorm_type}: {what} normalises {has}")
    if model.multi_latent_attention != can.latent:
        flag = "--multi-latent-attention" if model.multi_latent_attention else "no --multi-latent-attention"
        yield NoPlace(f"{flag}: {what} has {'a key and a value' if not can.latent else 'latent keys and values'}")
    if not can.own_head_dim and model.head_dim * model.num_attention_heads != model.hidden_size:
        yield NoPlace(f"--kv-channels {model.head_dim}: {what} has heads of hidden size / heads")
    if model.untie_embeddings_and_output_weights not in can.untied:
        untied = "untied" if model.untie_embeddings_and_output_weights else "tied"
        yield NoPlace(f"{untied} embedding and output weights: {what} has not")
    if model.cla_share_factor != 1:
        yield NoPlace(f"--cla-share-factor {model.cla_share_factor}: {what} has keys and values in every layer")
    if model.domain_embedding:
        yield NoPlace(f"--domain-embedding: {what} knows no domains")


def _activation(model: ModelConfig) -> Activation:
    if model.swiglu:
        return "swiglu"
    if model.gelu_tanh:
        return "gelu_tanh"
    return "squared_relu" if model.squared_relu else "gelu"


def _biases(model: ModelConfig) -> Biases:
    if not model.disable_bias_linear:
        return "all"
    return "qkv" if model.add_qkv_bias else "none"


def _expert_reasons(run: RunConfig, can: Abilities, what: str) -> Iterator[str]:
    moe = run.moe
    layout = expert_layout(run)
    if not layout.num_moe_layers:
        if can.dense != "all":
            yield NoPlace(f"no --num-experts: {what} has experts")
        return
    if can.dense == "all":
        yield NoPlace(f"--num-experts {format_value(moe.num_experts)}: {what} is dense")
        return
    if len(set(layout.counts)) > 1:
        yield NoPlace(f"--num-experts {format_value(moe.num_experts)}: {what} has as many experts in every layer")
    dense = [number for number, count in enumerate(layout.experts_per_layer, 1) if not count]
    if dense and can.dense == "none":
        yield NoPlace(f"dense layer {dense[0]}: {what} has experts in every layer")
    elif dense and can.dense == "first" and dense != list(range(1, len(dense) + 1)):
        yield NoPlace(f"dense layer {dense[-1]}: {what} has dense layers only before all others")
    if moe.use_expert_residual_network:
        yield NoPlace(f"--use-expert-residual-network: {what} has none")
    yield from _shared_reasons(run, can, what)
    chosen = gate(run)
    if isinstance(chosen, str):
        yield NoPlace(f"{chosen}; {what} has a gate that chooses by its logits")
    else:
        yield from _gate_reasons(chosen, run, can, what)


def _shared_reasons(run: RunConfig, can: Abilities, what: str) -> Iterator[str]:
    moe = run.moe
    if moe.mlp_type == "residual" and moe.residual_combine == "softmax":
        yield NoPlace(f"--residual-combine softmax: {what} has no coefficient beside its experts")
        return
    path = shared_path(run)
    kind: Literal["none", "plain", "gated"] = "none" if path is None else "gated" if path.gated else "plain"
    if kind in can.shared:
        return
    if path is None:
        yield NoPlace(f"no --moe-shared-expert-intermediate-size: {what} has a shared expert")
    elif path.gated and "plain" in can.shared:
        yield NoPlace(f"--moe-shared-expert-gate: {what} has no gate on its shared expert")
    elif can.shared == {"none"}:
        yield NoPlace(f"{_shared_flag(run, path)}: {what} has no shared expert")
    else:
        yield NoPlace(f"{_shared_flag(run, path)}: {what} has a gate on its shared expert")


def _shared_flag(run: RunConfig, path: SharedPath) -> str:
    if run.moe.mlp_type == "residual":
        return "--mlp-type residual"
    return f"--moe-shared-expert-intermediate-size {path.width}"


def _gate_reasons(chosen: Gate, run: RunConfig, can: Abilities, what: str) -> Iterator[str]:
    if chosen.score != can.score:
        yield f"{chosen.score} scores of experts: {what} has {can.score}"
    if chosen.topk == 1 and False not in can.renormalised:
        # One expert's weight is its score, and 1 where weights are made to sum to 1.
        yield f"--moe-router-topk 1: in {what} the weight of a token's only expert is 1"
    elif chosen.topk > 1 and chosen.renormalised not in can.renormalised:
        sums = "sum to 1" if chosen.renormalised else "do not sum to 1"
        yield f"weights of a token's experts {sums} (--moe-router-pre-softmax): {what} has it the other way"
    if chosen.scale != 1.0 and not can.scale:
        yield f"--moe-router-topk-scaling-factor {chosen.scale:g}: {what} has no such factor"
    if chosen.groups is not None:
        number, used = chosen.groups
        flags = f"--moe-router-num-groups {number} --moe-router-group-topk {used}"
        if not can.groups:
            yield f"{flags}: {what} has no groups of experts"
        elif chosen.topk // used != 2:
            yield (
                f"{flags} --moe-router-topk {chosen.topk}: our groups are chosen by their best {chosen.topk // used} "
                f"(top-k / groups); {what} takes the best 2"
            )
    if chosen.bias and not can.bias:
        yield NoPlace(f"--moe-router-enable-expert-bias: {what} has no bias on the choice of experts")
    if can.groups and expert_layout(run).max_experts < 2:
        yield NoPlace(f"--num-experts {format_value(run.moe.num_experts)}: {what} needs at least 2")


_NO_GATE = {
    "expert-choice": "experts choose tokens",
    "hash": "a table decides on a token's expert",
    "random-routed": "a table decides on a token's expert",
    "token-embedding": "an embedding of the token decides on its expert",
}


def gate(run: RunConfig) -> Gate | str:
    """What the run's router computes outside of training, or why no top-k of a learned gate does.

    Recycle and base give way to capacity and balance in training alone, and so does Sinkhorn's assignment
    (`moe/routers`, upstream `router.py:TopKRouter.sinkhorn_load_balancing`). A margin is training's too, but
    --router-margin-scale stays.
    """
    moe, routing = run.moe, run.routing
    if moe.router in _NO_GATE:
        return f"--router {moe.router}: {_NO_GATE[moe.router]}"
    if routing.router_margin_scale is not None:
        return f"--router-margin-scale {routing.router_margin_scale:g}: cosines decide on a token's expert"
    if moe.router == "base":
        return Gate("sigmoid", 1, renormalised=False, scale=1.0, groups=None, bias=False)
    if moe.moe_router_load_balancing_type == "sinkhorn":
        score: Literal["softmax", "sigmoid"] = "sigmoid" if moe.moe_router_topk == 1 else "softmax"
        return Gate(score, moe.moe_router_topk, renormalised=False, scale=1.0, groups=None, bias=False)
    softmax = moe.moe_router_score_function == "softmax"
    number, used = moe.moe_router_num_groups, moe.moe_router_group_topk
    return Gate(
        score=moe.moe_router_score_function,
        topk=moe.moe_router_topk,
        renormalised=not moe.pre_softmax if softmax else moe.moe_router_topk > 1,
        scale=1.0 if moe.moe_router_topk_scaling_factor is None else moe.moe_router_topk_scaling_factor,
        groups=None if number is None or used is None or number == used else (number, used),
        bias=moe.moe_router_enable_expert_bias,
    )


MATTERS: dict[type, frozenset[str]] = {
    ModelConfig: frozenset(
        {
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "max_position_embeddings",
            "position_embedding_type",
            "rotary_base",
            "rotary_percent",
            "use_rope_scaling",
            "rope_scaling_factor",
            "normalization",
            "norm_epsilon",
            "swiglu",
            "squared_relu",
            "gelu_tanh",
            "disable_bias_linear",
            "add_qkv_bias",
            "untie_embeddings_and_output_weights",
            "qk_layernorm",
            "qk_layernorm_type",
            "multi_latent_attention",
            "q_lora_rank",
            "kv_lora_rank",
            "qk_head_dim",
            "qk_pos_emb_head_dim",
            "v_head_dim",
            "rotary_scaling_factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "cla_share_factor",
            "domain_embedding",
            "vocab_size",
        }
    ),
    MoEConfig: frozenset(
        {
            "num_experts",
            "expert_interval",
            "moe_layer_freq",
            "moe_first_dense_layers",
            "mlp_type",
            "residual_combine",
            "moe_ffn_hidden_size",
            "use_expert_residual_network",
            "expert_residual_layers",
            "router",
            "moe_router_topk",
            "moe_router_score_function",
            "moe_router_pre_softmax",
            "moe_router_topk_scaling_factor",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_router_load_balancing_type",
            "moe_router_enable_expert_bias",
            "moe_shared_expert_intermediate_size",
            "moe_shared_expert_gate",
        }
    ),
    RoutingConfig: frozenset({"router_margin_scale"}),
}
"""Flags that change what a native class would have to compute: each is looked at above or written to config.json."""

MATTERS_NOT: dict[type, dict[str, str]] = {
    ModelConfig: {
        "seq_length": "the length of training samples",
        "attention_weight_reuse_prob": "training; generation and scoring compute the weights of every layer",
        "attention_weight_reuse_span": "as attention_weight_reuse_prob",
        "num_domains": "counts what domain_embedding and random-routed look up, which are refused",
        "domain_names": "names",
        "attention_dropout": "training",
        "hidden_dropout": "training",
        "init_method_std": "the first step",
        "make_vocab_size_divisible_by": "rows that only pad the tables; they are left out",
        "transformer_impl": "how it is computed, not what",
        "attention_backend": "how it is computed, not what",
    },
    MoEConfig: {
        "moe_expert_dropout": "training",
        "moe_aux_loss_coeff": "a loss",
        "moe_z_loss_coeff": "a loss",
        "moe_router_bias_update_rate": "training; the bias itself is a weight",
        "moe_router_dtype": "precision, not the function",
        "moe_input_jitter_eps": "training",
        "moe_router_noise": "training",
        "moe_expert_capacity_factor": "training; generation and scoring are dropless (expert-choice, which is not, is "
        "refused)",
        "moe_pad_expert_input_to_capacity": "training",
        "moe_min_capacity": "training",
        "moe_token_drop_policy": "training",
        "moe_expert_backend": "how it is computed, not what",
        "moe_token_dispatcher_type": "how it is computed, not what",
        "moe_domain_grouped": "which rank works on a sequence",
    },
    RoutingConfig: {
        "router_margin_type": "training, but for the cosines of router_margin_scale",
        "router_margin": "training",
        "router_margin_target": "training",
        "router_margin_gate": "training",
        "router_margin_beta": "training",
        "router_margin_beta_decay": "training",
        "router_margin_beta_min": "training",
        "router_margin_loss_coeff": "a loss",
        "router_map": "routers with a table, which are refused",
        "router_token_counts": "routers with a table, which are refused",
        "router_domain_shares": "random-routed, which is refused",
        "router_embedding_size": "token-embedding, which is refused",
        "router_embedding_shared": "token-embedding, which is refused",
        "router_cutoff_decay": "expert-choice, which is refused",
    },
}
"""Flags that change nothing of that, and why."""
