"""Reads a checkpoint under any parallel layout, after checking that it holds the same model."""

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint import TensorStorageMetadata
from torch.distributed.checkpoint.api import CheckpointException

from megatron_moe.checkpoint import safe_reader
from megatron_moe.checkpoint.in_place import keep_in_place
from megatron_moe.checkpoint.layout import CONFIG_FILE, WEIGHTS_ONLY, find_checkpoint, is_hugging_face
from megatron_moe.checkpoint.optimizer_state import OptimizerLoad
from megatron_moe.checkpoint.same_model import check_same_model
from megatron_moe.checkpoint.state import Progress, current_layout, model_state, rng_state
from megatron_moe.checkpoint.torch_metadata import check_folder, read_metadata
from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.model.parameters import count_parameters
from megatron_moe.runtime import replace
from megatron_moe.runtime.seeds import restore_states, set_seeds

# torch's own is no `Exception`, so that nothing catches it by chance.
DAMAGE = (Exception, CheckpointException)


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
    if is_hugging_face(run.checkpoint.load):
        from megatron_moe.checkpoint.hf.loading import load_weights

        load_weights(run, model, Path(run.checkpoint.load))
        optimizer.reload_model_params()
        return Progress()
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
    check_folder(folder)
    replace.apply(safe_reader.REPLACEMENTS)
    try:
        common = dist_checkpointing.load_common_state_dict(str(folder))
    except DAMAGE as error:
        raise _damaged(folder, "cannot read its common state", error) from error
    if WEIGHTS_ONLY in common:
        origin = str(common[WEIGHTS_ONLY])[:200]
        raise UserError(f"--load {folder.parent}: holds weights only, converted from {origin}; give --finetune")
    try:
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
    check_folder(folder)
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
