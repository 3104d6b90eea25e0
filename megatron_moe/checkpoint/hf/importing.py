"""A checkpoint of another program as a run of ours: weights, flags, tokenizer; complete and proved, or not there."""

import dataclasses
import importlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.checkpoint.convert.blocks import Block
from megatron_moe.checkpoint.convert.describe import CheckpointModel, describe
from megatron_moe.checkpoint.convert.journal import unfinished_folder
from megatron_moe.checkpoint.convert.ours_writer import OursWriter
from megatron_moe.checkpoint.convert.stream import convert
from megatron_moe.checkpoint.convert.tensors import TensorSource
from megatron_moe.checkpoint.foreign.model import ForeignModel
from megatron_moe.checkpoint.hf.families.base import Family
from megatron_moe.checkpoint.hf.families.native import is_left_out
from megatron_moe.checkpoint.hf.folders import check_room_early, check_target
from megatron_moe.checkpoint.hf.inspect import parameters_of_dtype, read_config
from megatron_moe.checkpoint.hf.options import TORCH_NAMES, ForeignOptions, ImportOptions
from megatron_moe.checkpoint.hf.own_code import needs_code
from megatron_moe.checkpoint.hf.targets import family_of, run_of
from megatron_moe.checkpoint.hf.tokenizer import import_tokenizer
from megatron_moe.checkpoint.hf.verify import Proof, check_transformers, keeping_what_is_written, prove
from megatron_moe.checkpoint.hf.weight_files import RenamedSource, open_files
from megatron_moe.checkpoint.layout import CONFIG_FILE, TOKENIZER_FOLDER, checkpoint_folder
from megatron_moe.config.base import UserError, disk_error
from megatron_moe.config.data import DataConfig
from megatron_moe.config.run import CheckpointConfig, RunConfig
from megatron_moe.config.schema import run_sections
from megatron_moe.config.yaml_io import Values, build_run, load_values, save_run
from megatron_moe.data.tokenizer.kinds.sentence_piece import SAVED_NAME
from megatron_moe.data.tokenizer.load import Tokenizer, load_saved_tokenizer, load_tokenizer, with_vocab_size
from megatron_moe.inference.saved_model import SavedModel

_PRECISION = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_STEP = 0


@dataclass(frozen=True)
class Import:
    """What becomes a run, once all has been looked at and nothing is written yet."""

    run: RunConfig
    source: TensorSource
    blocks: list[Block]
    model: CheckpointModel
    """Our tensors."""
    tokenizer: Tokenizer
    save: Path
    workers: int | None
    where: Path
    """The source's folder."""


def open_hf(folder: Path) -> tuple[RunConfig, Family, RenamedSource]:
    """A Hugging Face folder: the flags of its model, its class and its weights.

    Raises:
        UserError: its model is not one of ours, or a file is missing or damaged.
    """
    config = read_config(folder)
    try:
        run, family = run_of(config), family_of(config)
    except UserError as error:
        raise UserError(f"--hf {folder}: {error}") from error
    return run, family, open_files(folder, family, run)


def import_hf(options: ImportOptions, *, debug: bool = False) -> Iterator[str]:
    """Make a run of a Hugging Face checkpoint.

    Args:
        options: the flags.
        debug: show what the fresh process prints.

    Yields:
        Lines that say what is done.

    Raises:
        UserError: a flag or file is wrong, the model is not one of ours, the disk is too small, or the proof failed.
    """
    if options.verify:
        check_transformers()
    folder, save = Path(options.hf), Path(options.save)
    check_target(save, "--save", folder, "--hf")
    run, family, source = open_hf(folder)
    config = read_config(folder)
    remote_code = needs_code(config)
    run = _with_vocabulary_multiple(run, options.make_vocab_size_divisible_by)
    assert run.model.vocab_size is not None
    tokenizer = import_tokenizer(folder, run.model.vocab_size, options.tokenizer)
    # The map depends on the rows that pad the vocabulary.
    made = _plan(run, source, family.blocks(run), tokenizer, save, options.dtype, options.workers, folder)
    source.check_tied()
    proof: list[Proof] = []

    def finish(checkpoint: Path) -> None:
        if options.verify:
            saved = SavedModel(checkpoint, made.run, tokenizer)
            dtype = next(iter(parameters_of_dtype(made.model.infos)))
            with keeping_what_is_written():
                proof.append(
                    prove(
                        saved,
                        folder,
                        dtype=dtype,
                        left_out=lambda key: is_left_out(family, run, key),
                        remote_code=remote_code,
                        debug=debug,
                    )
                )

    _write(made, finish)
    yield f"{folder}: {family.architecture} of {len(source.infos)} tensors"
    if options.dtype == "auto":
        yield from _rounded(made)
    yield _made(made)
    yield from proof[0].lines() if proof else ["NOT verified (--no-verify)"]
    yield _advice(save)


def import_foreign(options: ForeignOptions, command: str) -> Iterator[str]:
    """Make a run of a checkpoint of PAI, DeepSpeed or Megatron-LM.

    Args:
        options: the flags.
        command: `from-pai`, `from-deepspeed` or `from-megatron`.

    Yields:
        Lines that say what is done.

    Raises:
        UserError: a flag or file is wrong, the model is not one of ours, or the disk is too small.
    """
    folder, save = Path(options.source), Path(options.save)
    check_target(save, "--save", folder, "--source")
    flags = None if options.config is None else load_values(options.config, run_sections(RunConfig))
    opened = opener(command)(folder, flags)
    run = build_run(opened.sections)
    if options.tokenizer is not None or opened.tokenizer is None:
        assert run.model.vocab_size is not None
        tokenizer = import_tokenizer(folder, run.model.vocab_size, options.tokenizer, flag="--source")
    else:
        data = DataConfig(tokenizer_type=opened.tokenizer_type, tokenizer_model=str(opened.tokenizer))  # type: ignore[arg-type]
        tokenizer = load_tokenizer(data, run.model.vocab_size)
    made = _plan(run, opened.source, opened.blocks, tokenizer, save, options.dtype, options.workers, folder)
    _write(made, None)
    yield f"{folder}: {len(opened.source.infos)} tensors"
    yield from (f"note: {note}" for note in opened.notes)
    yield from (f"left out: {name}: {reason}" for name, reason in opened.unused.items())
    yield _made(made)
    yield (
        "every number of every tensor on both sides was placed exactly once; logits were NOT compared: there is no "
        "second program for this format"
    )
    yield _advice(save)


def opener(command: str) -> Callable[[Path, Values | None], ForeignModel]:
    """What opens the checkpoints of a command."""
    module = importlib.import_module(f"megatron_moe.checkpoint.foreign.{command.removeprefix('from-')}")
    return getattr(module, f"open_{command.removeprefix('from-')}")


def _with_vocabulary_multiple(run: RunConfig, multiple: int | None) -> RunConfig:
    if multiple is None:
        return run
    return dataclasses.replace(run, model=dataclasses.replace(run.model, make_vocab_size_divisible_by=multiple))


def _plan(
    run: RunConfig,
    source: TensorSource,
    blocks: list[Block],
    tokenizer: Tokenizer,
    save: Path,
    dtype: str,
    workers: int | None,
    where: Path,
) -> Import:
    """The run as it will be saved, after a look at everything that could be wrong."""
    found = next(iter(parameters_of_dtype(source.infos)))
    torch_name = TORCH_NAMES.get(dtype, found)
    if torch_name not in _PRECISION:
        raise UserError(f"{where}: its weights are {found}, which is not trained here; give --dtype fp32, bf16 or fp16")
    precision = _PRECISION[torch_name]
    training = dataclasses.replace(run.training, bf16=precision == "bf16", fp16=precision == "fp16")
    run = dataclasses.replace(
        with_vocab_size(run, tokenizer),
        training=training,
        data=_data_flags(tokenizer, save),
        checkpoint=CheckpointConfig(save=str(save)),
    )
    model = describe(run)
    check_room_early(save, sum(info.nbytes for info in model.infos.values()), "--save")
    return Import(run, source, blocks, model, tokenizer, save, workers, where)


def _write(made: Import, finish: Callable[[Path], None] | None) -> None:
    unfinished = unfinished_folder(made.save)
    # Before the weights, which take hours.
    _check_tokenizer(made.tokenizer)

    def add_files(folder: Path) -> None:
        checkpoint = checkpoint_folder(folder, _STEP)
        made.tokenizer.save_to(checkpoint / TOKENIZER_FOLDER)
        for place in (checkpoint, folder):
            save_run(made.run, place / CONFIG_FILE)
        if finish is not None:
            finish(checkpoint)

    convert(
        made.blocks,
        made.source,
        OursWriter(unfinished, made.model, made.where.name),
        made.save,
        inputs=[made.where],
        finish=add_files,
        flag="--save",
        workers=made.workers,
    )


def _check_tokenizer(tokenizer: Tokenizer) -> None:
    """What the run will hold of it must be read back as the same."""
    with tempfile.TemporaryDirectory(prefix="megatron_moe-import-") as scratch:
        folder = Path(scratch) / TOKENIZER_FOLDER
        try:
            tokenizer.save_to(folder)
        except OSError as error:
            raise disk_error(scratch, error) from error
        again = load_saved_tokenizer(folder)
    if (again.vocab_size, again.eod) != (tokenizer.vocab_size, tokenizer.eod):
        raise UserError(
            f"tokenizer: a copy of it has {again.vocab_size} ids and ends documents with {again.eod} instead of "
            f"{tokenizer.vocab_size} and {tokenizer.eod}; give another one with --tokenizer"
        )


def _rounded(made: Import) -> Iterator[str]:
    """What a folder of several types holds in more bits than a run of its usual type does."""
    ours, theirs = made.model.infos, made.source.infos
    names = sorted(
        {
            block.theirs.name
            for block in made.blocks
            if block.ours is not None
            and block.theirs is not None
            and theirs[block.theirs.name].dtype.itemsize > ours[block.ours.name].dtype.itemsize
        }
    )
    if names:
        yield (
            f"note: {len(names)} tensors were rounded to the type of most others ({names[0]} is "
            f"{str(theirs[names[0]].dtype).removeprefix('torch.')}); --dtype fp32 keeps them to the bit"
        )


def _made(made: Import) -> str:
    infos = made.model.infos
    return (
        f"{made.save}: {len(infos)} tensors, {sum(info.nbytes for info in infos.values()):,} bytes in "
        f"{next(iter(parameters_of_dtype(infos)))}, step {_STEP}, tokenizer {type(made.tokenizer).__name__}"
    )


def _data_flags(tokenizer: Tokenizer, save: Path) -> DataConfig:
    """The flags that name the tokenizer where it will lie in the run."""
    kind = type(tokenizer).__name__
    if kind == "NullTokenizer":
        return DataConfig(tokenizer_type="NullTokenizer")
    folder = checkpoint_folder(save, _STEP) / TOKENIZER_FOLDER
    named = folder / SAVED_NAME if kind in ("SentencePieceTokenizer", "CPMTokenizer") else folder
    return DataConfig(tokenizer_type=kind, tokenizer_model=str(named))  # type: ignore[arg-type]


def _advice(save: Path) -> str:
    return (
        f"use it: python -m megatron_moe.generate --load {save} --prompt ...; python -m megatron_moe.pretrain --config "
        f"{save / CONFIG_FILE} --load {save} --finetune --save NEW ..."
    )
