"""Opens a checkpoint without reading its weights: its flags, its tokenizer, and whether a layout fits it. No torch."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.checkpoint.layout import (
    CONFIG_FILE,
    TOKENIZER_FOLDER,
    checkpoint_folder,
    find_checkpoint,
    is_hugging_face,
)
from megatron_moe.config.base import ConfigError, UserError, flag_name, format_value
from megatron_moe.config.optimizer import OptimizerConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.training import TrainingConfig
from megatron_moe.config.validate import validate
from megatron_moe.config.yaml_io import load_saved_run
from megatron_moe.data.tokenizer.load import Tokenizer, load_saved_tokenizer
from megatron_moe.inference.options import LoadOptions

# They change how a run is trained; here nothing would answer to them.
TRAINING_ONLY = (
    "num_layers_per_virtual_pipeline_stage",
    "context_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
)


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint that can be loaded."""

    folder: Path
    """The checkpoint, `RUN/iter_0000100`, or a folder of Hugging Face."""
    run: RunConfig
    """The model's flags as it was trained, with the parallel sizes and the precision to load it with."""
    tokenizer: Tokenizer
    """The one it was trained with."""

    @property
    def max_positions(self) -> int:
        """Most tokens that the model reads at once."""
        return self.run.model.max_positions

    @property
    def vocab_size(self) -> int:
        """Ids that texts may hold; the rows of the embedding that only pad it are not among them."""
        assert self.run.model.vocab_size is not None
        return self.run.model.vocab_size


def open_checkpoint(options: LoadOptions, parallel: ParallelConfig, world_size: int) -> SavedModel:
    """Find a checkpoint and read what lies beside its weights.

    Args:
        options: which one.
        parallel: the layout to load it under; it need not be the one it was written under.
        world_size: processes there are.

    Raises:
        ConfigError: the layout does not fit the model or the number of processes.
        UserError: there is no such checkpoint, or it has no config or no tokenizer.
    """
    defaults = ParallelConfig()
    for name in TRAINING_ONLY:
        if getattr(parallel, name) != getattr(defaults, name):
            value = getattr(parallel, name)
            shown = "" if value is True else f" {format_value(value)}"
            raise ConfigError(f"{flag_name(name)}{shown}: is for training only; leave it out here")
    if is_hugging_face(options.load):
        return _open_hugging_face(options, parallel, world_size)
    folder = _choose_folder(options)
    run = _inference_run(load_saved_run(folder / CONFIG_FILE), parallel, options.eval_fp32)
    _validate(run, world_size)
    return SavedModel(folder, run, load_saved_tokenizer(folder / TOKENIZER_FOLDER))


def _open_hugging_face(options: LoadOptions, parallel: ParallelConfig, world_size: int) -> SavedModel:
    from megatron_moe.checkpoint.hf.loading import in_its_precision, model_of, tokenizer_of

    folder = Path(options.load)
    if options.iteration is not None:
        raise ConfigError(f"--iteration {options.iteration}: {folder} is a Hugging Face checkpoint, which has no steps")
    saved = model_of(folder)
    run = _inference_run(in_its_precision(saved, folder), parallel, options.eval_fp32)
    _validate(run, world_size)
    return SavedModel(folder, run, tokenizer_of(folder, saved))


def _choose_folder(options: LoadOptions) -> Path:
    latest = find_checkpoint(options.load)
    if options.iteration is None:
        return latest
    folder = checkpoint_folder(options.load, options.iteration)
    if not folder.is_dir():
        steps = sorted(int(path.name[5:]) for path in Path(options.load).glob("iter_*") if path.name[5:].isdigit())
        raise UserError(
            f"--iteration {options.iteration}: {options.load} holds no such checkpoint; there are {format_value(steps)}"
        )
    return folder


def _inference_run(saved: RunConfig, parallel: ParallelConfig, fp32: bool) -> RunConfig:
    """The saved model under another layout, with everything that concerns training back at its default."""
    training = TrainingConfig(
        train_iters=1,
        seed=saved.training.seed,
        bf16=saved.training.bf16 and not fp32,
        fp16=saved.training.fp16 and not fp32,
    )
    model = dataclasses.replace(saved.model, attention_weight_reuse_prob=1.0, attention_weight_reuse_span=None)
    # Here every rank gets texts of any domain.
    moe = dataclasses.replace(saved.moe, moe_domain_grouped=False)
    return dataclasses.replace(
        saved, model=model, moe=moe, parallel=parallel, training=training, optimizer=OptimizerConfig()
    )


def _validate(run: RunConfig, world_size: int) -> None:
    # Training splits sequences of --seq-length over ranks. Here sequences have any length and stay whole, so the
    # length that is checked is one that always fits.
    model = dataclasses.replace(
        run.model, seq_length=run.parallel.tensor_model_parallel_size, max_position_embeddings=None
    )
    validate(dataclasses.replace(run, model=model), world_size)
