"""Reads a checkpoint under any parallel layout, after checking that it holds the same model."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import TensorStorageMetadata
from torch.distributed.checkpoint.api import CheckpointException

from megatron_moe.checkpoint import safe_reader
from megatron_moe.checkpoint.in_place import keep_in_place
from megatron_moe.checkpoint.layout import CONFIG_FILE, WEIGHTS_ONLY, find_checkpoint
from megatron_moe.checkpoint.optimizer_state import OptimizerLoad
from megatron_moe.checkpoint.state import Progress, current_layout, model_state, rng_state
from megatron_moe.checkpoint.torch_metadata import read_metadata
from megatron_moe.config.base import UserError, flag_name, format_value
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import load_saved_run
from megatron_moe.model.parameters import count_parameters
from megatron_moe.moe.layout import expert_layout
from megatron_moe.runtime import replace
from megatron_moe.runtime.seeds import restore_states, set_seeds

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
# torch's own is no `Exception`, so that nothing catches it by chance.
DAMAGE = (Exception, CheckpointException)
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


def load_model(model: list[Any], folder: Path) -> None:
    """Load weights alone, as generation and scoring need them.

    Raises:
        UserError: the checkpoint is damaged or holds other tensors than the model.
    """
    _read(model_state(model), model, folder)


def load_checkpoint(run: RunConfig, model: list[Any], optimizer: Any, scheduler: Any) -> Progress:
    """Put a run's state back from the newest checkpoint of --load; every rank calls it.

    With --finetune only weights are taken; with --no-load-optim and --no-load-rng those parts are left as they are.
    Random-number states belong to a layout: under another one they start anew from the seed and the step.

    Raises:
        UserError: there is no checkpoint, or it is damaged, or of another model.
    """
    assert run.checkpoint.load is not None
    folder = find_checkpoint(run.checkpoint.load)
    check_same_model(run, folder)
    if run.checkpoint.finetune:
        load_model(model, folder)
        optimizer.reload_model_params()
        return Progress()
    common = _common_state(folder)
    saved = _progress(common, folder)
    sharded = model_state(model)
    wanted: dict[str, Any] = dict(sharded)
    loading: OptimizerLoad | None = None
    if not run.checkpoint.no_load_optim:
        try:
            loading = OptimizerLoad(sharded, optimizer, common["optimizer_common"], folder)
        except DAMAGE as error:
            raise _damaged(folder, "cannot be loaded", error) from error
        wanted["optimizer"] = loading.wanted
    same_layout = saved.layout == current_layout()
    if same_layout and not run.checkpoint.no_load_rng:
        wanted["rng_state"] = rng_state()
    state = _read(wanted, model, folder)
    if loading is not None:
        loading.finish(state["optimizer"])
    else:
        optimizer.reload_model_params()
    try:
        scheduler.load_state_dict(common["scheduler"])
        if "rng_state" in wanted:
            restore_states(state["rng_state"])
    except DAMAGE as error:
        raise _damaged(folder, "scheduler or random numbers cannot be restored", error) from error
    if "rng_state" not in wanted and not run.checkpoint.no_load_rng:
        set_seeds(run.training.seed + saved.step)
    return saved


def check_same_model(run: RunConfig, folder: Path) -> None:
    """Compare the model's flags with those the checkpoint was written with.

    Raises:
        UserError: the first flag that differs, both values.
    """
    saved = load_saved_run(folder / CONFIG_FILE)
    pairs = [
        (name, getattr(saved.model, name), getattr(run.model, name))
        for name in vars(saved.model)
        if name not in FREE_MODEL_FLAGS and name not in RESOLVED_MODEL_FLAGS
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
        if theirs != ours:
            raise UserError(
                f"{flag_name(name)} {format_value(ours)}: the checkpoint {folder} was written with "
                f"{format_value(theirs)}; give the same, or another --load"
            )


def check_stored_size(run: RunConfig, folder: Path) -> None:
    """Before a model is built from the flags that stand in a checkpoint: refuse one larger than what is stored there.

    Raises:
        UserError: the flags describe another model than the tensors beside them.
    """
    stored = sum(
        entry.size.numel()
        for key, entry in read_metadata(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer.")
    )
    described = count_parameters(run, padded_vocab=True).total
    if described > stored:
        raise UserError(
            f"{folder / CONFIG_FILE}: describes a model of {described} parameters, but the checkpoint holds {stored} "
            "numbers; it is not the file that was written with it"
        )


def _common_state(folder: Path) -> dict[str, Any]:
    safe_reader.check_folder(folder)
    replace.apply(safe_reader.REPLACEMENTS)
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
        if WEIGHTS_ONLY in common:
            origin = str(common[WEIGHTS_ONLY])[:200]
            raise UserError(f"--load {folder.parent}: holds weights only, converted from {origin}; give --finetune")
        # Asked for here, so that a checkpoint without them is named as damaged and not met later.
        return {key: common[key] for key in ("progress", "scheduler", "optimizer_common")}
    except DAMAGE as error:
        raise _damaged(folder, "cannot read its common state", error) from error


def _progress(common: dict[str, Any], folder: Path) -> Progress:
    try:
        progress = Progress.from_saved(common["progress"], folder)
        for name, value in vars(Progress()).items():
            found = getattr(progress, name)
            if type(found) is not type(value) or (isinstance(found, int) and found < 0):
                raise ValueError(f"{name} is {str(found)[:40]!r}")
    except DAMAGE as error:
        raise _damaged(folder, "cannot read its progress", error) from error
    return progress


def _read(wanted: dict[str, Any], model: list[Any], folder: Path) -> dict[str, Any]:
    """Load the wanted parts; nothing that was asked for may be missing, and no weight may be left over."""
    safe_reader.check_folder(folder)
    replace.apply(safe_reader.REPLACEMENTS)
    keep_in_place(wanted)
    with safe_reader.parts_read() as parts:
        try:
            state, unused, absent = dist_checkpointing.load(wanted, str(folder), strict=StrictHandling.RETURN_ALL)
        except DAMAGE as error:
            raise _damaged(folder, "cannot be loaded", error) from error
        parts.check_together()
    leftover = {key for key in unused if not key.startswith(("optimizer.", "rng_state", "chained_", "common_state"))}
    if absent or leftover:
        problem = f"lacks {sorted(absent)[0]}" if absent else f"also holds {sorted(leftover)[0]}"
        raise UserError(f"{folder}: is not a checkpoint of this model: it {problem}; give the run's own flags")
    for index, chunk in enumerate(model):
        chunk.load_state_dict(state[f"model{index}"])
    return state


def _damaged(folder: Path, what: str, error: BaseException) -> UserError:
    return safe_reader.user_error(error) or UserError(f"{folder}: damaged checkpoint, {what} ({_first_line(error)})")


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        # torch gathers what went wrong on every rank.
        error = next(iter(error.failures.values()))[0]
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
