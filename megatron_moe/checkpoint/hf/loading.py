"""Loads a Hugging Face folder straight into the ranks of any layout: each reads its slices of the files, no more.

    torchrun --nproc-per-node 8 -m megatron_moe.pretrain --load HF_FOLDER --finetune --data-path ... \\
        --tensor-model-parallel-size 2 --expert-model-parallel-size 4
    python -m megatron_moe.generate --load HF_FOLDER --prompt ...

The model's flags and the tokenizer come from the folder. A flag that is given and says something else is refused.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Block, Box
from megatron_moe.checkpoint.convert.coverage import check_side
from megatron_moe.checkpoint.convert.describe import unstack, unstacked
from megatron_moe.checkpoint.convert.engine import Targets, assemble, check_fills
from megatron_moe.checkpoint.convert.ranges import split
from megatron_moe.checkpoint.convert.tensors import TensorInfo, TensorSource
from megatron_moe.checkpoint.hf.inspect import parameters_of_dtype, read_config
from megatron_moe.checkpoint.hf.own_flags import NOT_WRITTEN, SECTIONS
from megatron_moe.checkpoint.hf.targets import family_of, run_of
from megatron_moe.checkpoint.hf.tokenizer import import_tokenizer
from megatron_moe.checkpoint.hf.weight_files import RenamedSource, open_files
from megatron_moe.checkpoint.layout import TOKENIZER_FOLDER
from megatron_moe.checkpoint.same_model import FREE_MODEL_FLAGS, compare_given, compare_models
from megatron_moe.checkpoint.same_tokenizer import compare_tokenizers
from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.config.run import CheckpointConfig, RunConfig
from megatron_moe.config.yaml_io import Values, build_run
from megatron_moe.data.tokenizer.kinds.hugging_face import FILES
from megatron_moe.data.tokenizer.kinds.sentence_piece import SAVED_NAME
from megatron_moe.data.tokenizer.load import Tokenizer

FLAG = "--load"
# The rows that pad the vocabulary are no weights of the file.
FREE = FREE_MODEL_FLAGS | NOT_WRITTEN | {"make_vocab_size_divisible_by"}
# Numbers that are put together at a time, where they cannot be read straight into the model.
_PIECE = 16 * 1024 * 1024


def flags_of(folder: Path, given: Values) -> Values:
    """The model's and the tokenizer's flags, for a training run that loads this folder.

    Args:
        folder: of Hugging Face.
        given: what the user says: recipe, file and command line.

    Raises:
        ConfigError: a flag does not go with the folder.
        UserError: the folder's model is not one of ours, or a file is missing or damaged.
    """
    checkpoint = given.get("checkpoint", {})
    if not checkpoint.get("finetune"):
        raise ConfigError(f"{FLAG} {folder}: is a Hugging Face checkpoint, which holds weights alone; add --finetune")
    save = checkpoint.get("save")
    if save is not None and Path(save).resolve() == folder.resolve():
        raise ConfigError(f"--save {save}: is the Hugging Face folder itself; give another one")
    saved = model_of(folder)
    found: Values = {name: _changed(getattr(saved, name)) for name in SECTIONS}
    data = given.get("data", {})
    if "tokenizer_model" not in data and "tokenizer_type" not in data:
        found["data"] = _tokenizer_flags(folder, saved)
    compare_given(given, saved, f"config.json of {folder} says", FREE)
    compare_models(build_run(found, given), saved, f"config.json of {folder} says", FREE)
    open_weights(saved, folder)
    return found


def model_of(folder: Path) -> RunConfig:
    """The run whose model a folder holds.

    Raises:
        UserError: it is not one of ours, or config.json is damaged.
    """
    try:
        run = run_of(read_config(folder, FLAG))
    except UserError as error:
        raise UserError(f"{FLAG} {folder}: {error}") from error
    # A table of the router's comes with the weights.
    return dataclasses.replace(run, checkpoint=CheckpointConfig(load=str(folder)))


def in_its_precision(run: RunConfig, folder: Path) -> RunConfig:
    """The run with the precision that most weights of the folder have.

    Raises:
        UserError: nothing is computed in it here.
    """
    dtype = next(iter(parameters_of_dtype(open_weights(run, folder)[0].infos)))
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"{FLAG} {folder}: its weights are {dtype}; must be float32, bfloat16 or float16")
    training = dataclasses.replace(run.training, bf16=dtype == "bfloat16", fp16=dtype == "float16")
    return dataclasses.replace(run, training=training)


def open_weights(run: RunConfig, folder: Path) -> tuple[RenamedSource, list[Block]]:
    """The folder's tensors, and which part of our model is which part of them. Only headers are read.

    Raises:
        UserError: a file is missing or damaged, or they hold another model than config.json says.
    """
    family = family_of(read_config(folder, FLAG))
    source = open_files(folder, family, run)
    blocks = family.blocks(run)
    check_side(blocks, "theirs", source.infos, str(folder))
    return source, blocks


def load_weights(run: RunConfig, model: list[Any], folder: Path) -> None:
    """Fill this rank's part of the model; every rank calls it.

    Raises:
        ConfigError: the run's model is another one.
        UserError: a file is damaged.
    """
    from megatron_moe.checkpoint.state import model_state

    saved = model_of(folder)
    compare_models(run, saved, f"config.json of {folder} says", FREE)
    source, blocks = open_weights(run, folder)
    entries = list(_entries(model_state(model)))
    _check_ours(blocks, entries)
    # All ranks together look at all of them.
    check_fills(blocks[dist.get_rank() :: dist.get_world_size()], source)
    source.check_tied(dist.get_rank(), dist.get_world_size())
    targets = Targets(blocks, "ours")
    with torch.no_grad():
        for entry in entries:
            size = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
            values = entry.data.detach().view(size)
            parts = unstack(Box(entry.key, tuple(entry.global_offset), size))
            # A dense model's checkpoint would stack its layers.
            for part, target in zip(parts, [values] if parts[0].size == size else values, strict=True):
                _fill(targets, part, source, target)


def check_tokenizer(data: DataConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Compare a run's tokenizer with the folder's, if there is one.

    Raises:
        UserError: an id stands for other text, or the model's embedding has no row for it.
    """
    saved = model_of(folder)
    assert saved.model.vocab_size is not None
    if tokenizer.vocab_size > saved.model.vocab_size:
        named = "" if data.tokenizer_model is None else f" {data.tokenizer_model}"
        raise UserError(
            f"--tokenizer-model{named}: has {tokenizer.vocab_size} ids, but the model's embedding in {folder} has "
            f"{saved.model.vocab_size} rows; give the tokenizer that the model was trained with"
        )
    if _has_tokenizer(folder):
        compare_tokenizers(data, tokenizer, tokenizer_of(folder, saved), folder)


def tokenizer_of(folder: Path, saved: RunConfig) -> Tokenizer:
    """The folder's tokenizer.

    Raises:
        UserError: there is none, or it has ids that the embedding has no row for.
    """
    assert saved.model.vocab_size is not None
    return import_tokenizer(folder, saved.model.vocab_size, flag=FLAG)


def _has_tokenizer(folder: Path) -> bool:
    names = [name for name in FILES if name != "config.json"]
    return (folder / TOKENIZER_FOLDER).is_dir() or any((folder / name).is_file() for name in names)


def _tokenizer_flags(folder: Path, saved: RunConfig) -> dict[str, Any]:
    if not _has_tokenizer(folder):
        raise ConfigError(
            f"{FLAG} {folder}: holds no tokenizer; name one with --tokenizer-model, or --tokenizer-type NullTokenizer "
            "for ids without text"
        )
    kind = type(tokenizer_of(folder, saved)).__name__
    if kind == "NullTokenizer":
        return {"tokenizer_type": kind}
    place = folder / TOKENIZER_FOLDER if (folder / TOKENIZER_FOLDER).is_dir() else folder
    one_file = kind in ("SentencePieceTokenizer", "CPMTokenizer")
    return {"tokenizer_type": kind, "tokenizer_model": str(place / SAVED_NAME if one_file else place)}


def _changed(section: Any) -> dict[str, Any]:
    return {
        field.name: value
        for field in dataclasses.fields(section)
        if (value := getattr(section, field.name)) != field.default and field.name not in NOT_WRITTEN
    }


def _entries(tree: Any) -> Iterator[Any]:
    """The sharded tensors of a state; what a factory takes apart are views of the parameter."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for leaf in nested_values(tree):
        if isinstance(leaf, ShardedTensorFactory):
            with torch.no_grad():
                yield from _entries(leaf.build())
        elif isinstance(leaf, ShardedTensor):
            yield leaf


def _check_ours(blocks: list[Block], entries: list[Any]) -> None:
    """Every tensor of the model, on whichever rank, comes from the files, and all of the files goes somewhere."""
    mine = {entry.key: (tuple(entry.global_shape), entry.dtype) for entry in entries}
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    whole = {key: TensorInfo(*info) for theirs in everyones for key, info in theirs.items()}
    infos = {name: info for key, stored in whole.items() for name, info in unstacked(key, stored)}
    check_side(blocks, "ours", infos, "the model")


def _fill(targets: Targets, part: Box, source: TensorSource, target: Tensor) -> None:
    """Put a part of a tensor where it belongs, a piece at a time."""
    straight = target.device.type == "cpu"
    for start, size in split(part.size, _PIECE):
        begin = tuple(first + step for first, step in zip(part.start, start, strict=True))
        view = target.view(part.size)[Box("", start, size).slices]
        out = view if straight and view.is_contiguous() else None
        values = assemble(targets, Box(part.name, begin, size), source, view.dtype, out)
        if out is None:
            view.copy_(values)
