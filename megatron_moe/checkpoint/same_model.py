"""Refuses to load weights into another model than they are of: compares the flags that make it."""

from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.layout import CONFIG_FILE
from megatron_moe.config.base import ConfigError, flag_name, format_value
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import Values, load_saved_run
from megatron_moe.moe.layout import expert_layout

# What may differ between a checkpoint and the run that loads it: it changes no weight's shape or meaning.
FREE_MODEL_FLAGS = frozenset(
    {
        "seq_length",
        "max_position_embeddings",
        "attention_dropout",
        "hidden_dropout",
        "init_method_std",
        "attention_backend",
        # Of training only.
        "attention_weight_reuse_prob",
        "attention_weight_reuse_span",
    }
)
# Flags with a default that depends on others: what they come to is compared.
RESOLVED_MODEL_FLAGS = {"ffn_hidden_size": "ffn_size", "num_query_groups": "query_groups", "kv_channels": "head_dim"}
SHAPE_MOE_FLAGS = (
    "mlp_type",
    "residual_combine",
    "router",
    "moe_router_topk",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_enable_expert_bias",
)

SHAPE_ROUTING_FLAGS = (
    "router_margin_scale",
    "router_map",
    "router_domain_shares",
    "router_embedding_size",
    "router_embedding_shared",
)


def check_same_model(run: RunConfig, folder: Path) -> None:
    """Compare the model's flags with those the checkpoint was written with.

    Raises:
        ConfigError: the first flag that differs, both values.
    """
    compare_models(run, load_saved_run(folder / CONFIG_FILE), f"the checkpoint {folder} was written with")


def compare_models(run: RunConfig, saved: RunConfig, other: str, free: frozenset[str] = FREE_MODEL_FLAGS) -> None:
    """Compare the flags of two models that shall hold the same weights.

    Args:
        run: whose flags a user gives.
        saved: of the weights.
        other: what the message says of their value: "... was written with".
        free: flags of the model that may differ.

    Raises:
        ConfigError: the first flag that differs, both values.
    """
    pairs = [
        (name, getattr(saved.model, name), getattr(run.model, name))
        for name in vars(saved.model)
        if name not in free and name not in RESOLVED_MODEL_FLAGS
    ]
    pairs += [(name, getattr(saved.moe, name), getattr(run.moe, name)) for name in SHAPE_MOE_FLAGS]
    pairs += [(name, getattr(saved.routing, name), getattr(run.routing, name)) for name in SHAPE_ROUTING_FLAGS]
    pairs += [
        ("num_experts", expert_layout(saved).experts_per_layer, expert_layout(run).experts_per_layer),
        ("moe_ffn_hidden_size", saved.expert_ffn_size, run.expert_ffn_size),
        ("moe_router_pre_softmax", saved.moe.pre_softmax, run.moe.pre_softmax),
    ]
    # Defaults that follow from other flags come after those.
    pairs += [
        (name, getattr(saved.model, resolved), getattr(run.model, resolved))
        for name, resolved in RESOLVED_MODEL_FLAGS.items()
    ]
    if run.model.position_embedding_type == "learned_absolute":
        pairs.append(("max_position_embeddings", saved.model.max_positions, run.model.max_positions))
    for name, theirs, ours in pairs:
        _compare(name, theirs, ours, other)


def compare_given(given: Values, saved: RunConfig, other: str, free: frozenset[str]) -> None:
    """Compare flags by themselves, before the others are known without which they make no model.

    Raises:
        ConfigError: the first flag that differs, both values.
    """
    for section, names in (("model", vars(saved.model)), ("moe", SHAPE_MOE_FLAGS), ("routing", SHAPE_ROUTING_FLAGS)):
        for name, ours in given.get(section, {}).items():
            if name in names and name not in free and name not in RESOLVED_MODEL_FLAGS:
                _compare(name, getattr(getattr(saved, section), name), ours, other)


def _compare(name: str, theirs: Any, ours: Any, other: str) -> None:
    if theirs != ours:
        raise ConfigError(
            f"{flag_name(name)} {format_value(ours)}: {other} {format_value(theirs)}; give the same, or another --load"
        )
