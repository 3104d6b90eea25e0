"""A checkpoint of ours as a Hugging Face folder: weights, config, tokenizer, card; complete and proved or not there."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megatron_moe.checkpoint.convert.blocks import Block
from megatron_moe.checkpoint.convert.engine import target_infos
from megatron_moe.checkpoint.convert.journal import unfinished_folder
from megatron_moe.checkpoint.convert.ours_reader import OursSource
from megatron_moe.checkpoint.convert.safetensors_files import SafetensorsWriter
from megatron_moe.checkpoint.convert.stream import convert
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.hf.card import CardFacts, model_card
from megatron_moe.checkpoint.hf.families.base import Family
from megatron_moe.checkpoint.hf.folders import check_room_early, check_target
from megatron_moe.checkpoint.hf.generation_config import generation_config, special_ids
from megatron_moe.checkpoint.hf.inspect import parameters_of_dtype
from megatron_moe.checkpoint.hf.options import TORCH_NAMES, ExportOptions
from megatron_moe.checkpoint.hf.remote.family import copy_code
from megatron_moe.checkpoint.hf.served import REMOTE_TYPE
from megatron_moe.checkpoint.hf.targets import Target, choose_hf_target
from megatron_moe.checkpoint.hf.tokenizer import ExportedTokenizer, check_template, export_tokenizer
from megatron_moe.checkpoint.hf.verify import TOLERANCE, Proof, check_transformers, keeping_what_is_written, prove
from megatron_moe.checkpoint.layout import CONFIG_FILE
from megatron_moe.checkpoint.text_files import read_at_most
from megatron_moe.config.base import UserError, disk_error
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import load_saved_run
from megatron_moe.data.rows import read_rows
from megatron_moe.data.tokenizer.load import with_vocab_size
from megatron_moe.inference.options import LoadOptions
from megatron_moe.inference.saved_model import SavedModel, open_checkpoint
from megatron_moe.training.reporting import METRICS_FILE

_LARGEST_TEXT = 1 << 20


@dataclass(frozen=True)
class _Export:
    """What is exported, once all has been looked at and nothing is written yet."""

    options: ExportOptions
    saved: SavedModel
    trained: RunConfig
    """With the flags of training."""
    target: Target
    source: OursSource
    blocks: list[Block]
    infos: dict[str, TensorInfo]
    """Of the tensors to write."""
    template: str | None
    licence: str | None

    @property
    def family(self) -> Family:
        """The class."""
        return self.target.family

    @property
    def output(self) -> Path:
        """The folder to write."""
        return Path(self.options.output)

    @property
    def dtype(self) -> str:
        """Of most weights, as torch calls it."""
        return next(iter(parameters_of_dtype(self.infos)))


def export_hf(options: ExportOptions, command: str, *, debug: bool = False) -> Iterator[str]:
    """Export a checkpoint.

    Args:
        options: the flags.
        command: as it was typed, for the card.
        debug: show what the fresh process prints.

    Yields:
        Lines that say what is done.

    Raises:
        UserError: a flag or file is wrong, no class is exact, the disk is too small, or the proof failed.
    """
    export = _plan(options)
    yield from export.target.lines
    proof: list[Proof] = []
    with tempfile.TemporaryDirectory(prefix="megatron_moe-export-") as scratch:
        small = Path(scratch) / "files"
        # Before the weights, which take hours: a tokenizer without a twin of the same ids ends it here.
        try:
            small.mkdir()
            tokenizer = _write_small_files(export, small)
        except OSError as error:
            raise disk_error(scratch, error) from error

        def finish(folder: Path) -> None:
            """Everything but the weights."""
            shutil.copytree(small, folder, dirs_exist_ok=True)
            if options.verify:
                with keeping_what_is_written():
                    proof.append(_prove(export, folder, debug))
            (folder / "README.md").write_text(_card(export, command, tokenizer, proof), encoding="utf-8")

        convert(
            export.blocks,
            export.source,
            SafetensorsWriter(unfinished_folder(export.output), export.infos, options.shard_bytes),
            export.output,
            inputs=[export.saved.folder],
            finish=finish,
            flag="--output",
            workers=options.workers,
        )
    total = sum(info.nbytes for info in export.infos.values())
    yield f"{export.output}: {len(export.infos)} tensors, {total:,} bytes in {export.dtype}"
    yield f"tokenizer: {tokenizer.note}"
    yield from proof[0].lines() if proof else ["NOT verified (--no-verify)"]


def _plan(options: ExportOptions) -> _Export:
    """Look at everything that could be wrong."""
    check_transformers()
    output = Path(options.output)
    template = _text_file(options.chat_template, "--chat-template")
    if template is not None:
        check_template(template)
    licence = _text_file(options.license_file, "--license-file")
    load = LoadOptions(load=options.load, iteration=options.iteration)
    saved = open_checkpoint(load, ParallelConfig(device="cpu"), 1)
    check_target(output, "--output", Path(options.load), "--load")
    trained = load_saved_run(saved.folder / CONFIG_FILE)
    target = choose_hf_target(trained, options.target, allow_lossy=options.allow_lossy)
    source = OursSource(saved.folder)
    blocks = target.family.blocks(trained)
    dtype = None if options.dtype == "auto" else getattr(torch, TORCH_NAMES[options.dtype])
    infos = target_infos(blocks, "theirs", source.infos, dtype, target.family.fp32_names(trained))
    check_room_early(output, sum(info.nbytes for info in infos.values()), "--output")
    return _Export(options, saved, trained, target, source, blocks, infos, template, licence)


def _write_small_files(export: _Export, folder: Path) -> ExportedTokenizer:
    """Config, code, tokenizer, licence."""
    config: dict[str, Any] = {
        **export.target.config(export.trained),
        "dtype": export.dtype,
        "transformers_version": version("transformers"),
    }
    # It decides what transformers makes of the tokenizer's files, which then say their ids.
    _write_json(folder / "config.json", config)
    if export.family.model_type == REMOTE_TYPE:
        copy_code(folder)
    tokenizer = export_tokenizer(export.saved.tokenizer, folder, export.saved.max_positions, export.template)
    _write_json(folder / "config.json", {**config, **special_ids(tokenizer)})
    _write_json(folder / "generation_config.json", generation_config(tokenizer, config["transformers_version"]))
    if export.licence is not None:
        (folder / "LICENSE").write_text(export.licence, encoding="utf-8")
    return tokenizer


def _prove(export: _Export, folder: Path, debug: bool) -> Proof:
    lossy = not export.target.exact
    return prove(
        export.saved,
        folder,
        dtype=export.dtype,
        remote_code=export.family.model_type == REMOTE_TYPE,
        tolerance=math.inf if lossy else TOLERANCE,
        debug=debug,
    )


def _card(export: _Export, command: str, tokenizer: ExportedTokenizer, proof: Sequence[Proof]) -> str:
    options, step = export.options, int(export.saved.folder.name.removeprefix("iter_"))
    metrics = Path(options.load) / METRICS_FILE
    rows = [row for row in read_rows(metrics) if row["step"] <= step] if metrics.is_file() else []
    facts = CardFacts(
        name=export.output.resolve().name,
        run=with_vocab_size(export.trained, export.saved.tokenizer),
        step=step,
        architecture=export.family.architecture,
        model_type=export.family.model_type,
        dtype=export.dtype,
        reasons=[f"{name}: {reason}" for name, reason in export.target.others.items()],
        lost=export.target.losses,
        tokenizer=tokenizer,
        command=command,
        proof=proof[0] if proof else None,
        metrics=rows,
        license=options.license,
        license_file=export.licence is not None,
    )
    return model_card(facts)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _text_file(path: str | None, flag: str) -> str | None:
    if path is None:
        return None
    try:
        return read_at_most(Path(path), _LARGEST_TEXT).decode("utf-8")
    except UserError as error:
        raise UserError(f"{flag} {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{flag} {path}: cannot be read: is no UTF-8 text") from error
