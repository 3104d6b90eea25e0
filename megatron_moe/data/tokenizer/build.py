"""Building a tokenizer: sample the text, train, export to Hugging Face, judge it on held-out text.

Everything is made in the hidden folder `.work` of the output and takes its final name only when all is done; a killed
build goes on from the sample, which is the dear part of a large corpus, and trains again: SentencePiece cannot go on
where it stopped.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from tqdm import tqdm

from megatron_moe.config.base import UserError
from megatron_moe.data.command_line import byte_progress
from megatron_moe.data.files import atomic_file, atomic_write, expand_inputs, locked_file
from megatron_moe.data.tokenizer.export import hugging_face_files
from megatron_moe.data.tokenizer.judge import judge_all, open_all, used_pieces
from megatron_moe.data.tokenizer.kinds.sentence_piece import SentencePieceTokenizer
from megatron_moe.data.tokenizer.options import BuildOptions, choose_coverage
from megatron_moe.data.tokenizer.reading import read_all
from megatron_moe.data.tokenizer.report_page import report_page
from megatron_moe.data.tokenizer.sample import Sample, SampleOptions, sample_documents
from megatron_moe.data.tokenizer.train import Trained, TrainOptions, train_model
from megatron_moe.data.tokenizer.train_process import peak_memory
from megatron_moe.data.tokenizer.workspace import (
    MODEL_FILE,
    PAGE_FILE,
    REPORT_FILE,
    TIMINGS_FILE,
    VERSION,
    Identity,
    Workspace,
    identify,
)

_SENTENCES, _HELDOUT, _STATE = "sample.txt", "heldout.json", "sample.json"
_LOCK = "lock"
_CODE_POINTS = 0x110000
# SentencePiece's memory per byte of text, at most: measured 58 on 35 MB, 34 on 100 MB.
_MEMORY_PER_BYTE = 58
# So much of the sample shows which pieces are never used; encoding all of it would take as long as reading it.
_USED_TEXT_BYTES = 4 << 20
_BLOCK_LINES = 1 << 16


def build_tokenizer(
    inputs: Sequence[Path],
    output: Path,
    options: BuildOptions,
    *,
    heldout: Sequence[Path] = (),
    compare: Sequence[Path] = (),
    workers: int = 1,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Build a tokenizer into a folder; the same input and options give the same files, whatever `workers` is.

    Args:
        inputs: files and folders: JSON Lines, Parquet, plain text with a document a line; .gz or .zst.
        output: folder for tokenizer.model, the Hugging Face files, report.json, report.html and timings.json (the
            one file that differs from run to run).
        options: what to build.
        heldout: files or folders to judge it on, instead of documents held out of the input.
        compare: other tokenizers to judge on the same text.
        workers: processes that read.
        show_progress: draw progress bars; by default on a terminal.

    Returns:
        The content of report.json.

    Raises:
        UserError: unreadable input, a vocabulary that this text cannot fill or that is too small for it, or an
            output folder that holds something else.
    """
    files = expand_inputs(inputs)
    heldout_files = expand_inputs(heldout, "--heldout") if heldout else []
    if heldout_files:
        options = dataclasses.replace(options, sample=dataclasses.replace(options.sample, heldout_every=0))
    identity = identify(files, heldout_files, compare, options)
    space = Workspace(output, identity)
    if space.finished is not None:
        return space.finished
    busy = f"{space.flag}: another process is working there; wait until it ends"
    with locked_file(space.work / _LOCK, busy, space.flag):
        return _build(files, heldout_files, compare, options, identity, space, workers, show_progress)


def _build(
    files: Sequence[Path],
    heldout_files: Sequence[Path],
    compare: Sequence[Path],
    options: BuildOptions,
    identity: Identity,
    space: Workspace,
    workers: int,
    show_progress: bool | None,
) -> dict[str, Any]:
    # Before the hours that training may take.
    others = open_all(compare)
    clock = _Clock()
    state = _sample(files, space.work, options.sample, identity.sample, workers, show_progress)
    clock.mark("reading")
    training = _train_options(options, state)
    trained = _train(space.work, state, training, show_progress)
    clock.mark("training")
    model = space.work / MODEL_FILE
    exported = hugging_face_files(model.read_bytes(), str(model)) if options.model_type == "bpe" else {}
    for name, content in exported.items():
        atomic_write(space.work / name, content, space.flag)
    clock.mark("export")
    tokenizer = SentencePieceTokenizer(model)
    texts = _held_out_texts(space.work, heldout_files, options.sample)
    report = {
        "version": VERSION,
        "inputs": [{"file": str(path), "bytes": path.stat().st_size} for path in files],
        "heldout_files": [str(path) for path in heldout_files],
        "options": _plain(options) | {"character_coverage": training.character_coverage},
        "read": {key: value for key, value in state.items() if key not in ("identity", "character_counts")},
        # The trainer's log says how many it took; with any lost there would be no report.
        "skipped_sentences": state["sampled_sentences"] - trained.sentences,
        "special_tokens": options.symbols.ids(),
        "files": [MODEL_FILE, *sorted(exported)],
        "pieces": used_pieces(tokenizer, texts, _some_sentences(space.work / _SENTENCES), options.symbols.count),
        "heldout": judge_all(tokenizer, texts, others),
    }
    clock.mark("judging")
    timings = {
        "identity": identity.build,
        "seconds": clock.seconds,
        "trainer_peak_bytes": trained.peak_bytes,
        "trainer_peak_bytes_per_byte_of_text": round(trained.peak_bytes / state["sampled_bytes"], 1),
        "own_peak_bytes": peak_memory(),
        "workers": workers,
    }
    for name, content in {
        PAGE_FILE: report_page(report).render(),
        TIMINGS_FILE: _dump(timings),
        REPORT_FILE: _dump(report),
    }.items():
        atomic_write(space.work / name, content, space.flag)
    space.give_names([MODEL_FILE, *exported, PAGE_FILE, TIMINGS_FILE, REPORT_FILE])
    return report


def train_tokenizer(
    inputs: Sequence[Path], model: Path, vocab_size: int, *, split_by_unicode_script: bool = False
) -> None:
    """Train on all documents and write the `.model` file alone, without a report or an export.

    Raises:
        UserError: see `build_tokenizer`.
    """
    options = BuildOptions(
        vocab_size=vocab_size,
        split_by_unicode_script=split_by_unicode_script,
        sample=SampleOptions(heldout_every=0),
    )
    files = expand_inputs(inputs)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        state = _sample(files, work, options.sample, "", 1, False)
        _train(work, state, _train_options(options, state), False)
        atomic_write(model, (work / MODEL_FILE).read_bytes())


class _Clock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def mark(self, step: str) -> None:
        """End a step."""
        now = time.monotonic()
        self.seconds[step], self._last = round(now - self._last, 2), now


def _sample(
    files: Sequence[Path], work: Path, options: SampleOptions, identity: str, workers: int, shown: bool | None
) -> dict[str, Any]:
    """Write the sample and the held-out documents to files, unless a killed build has done so; what they hold."""
    state_file = work / _STATE
    if state_file.is_file():
        state: dict[str, Any] = json.loads(state_file.read_bytes())
        if state["identity"] == identity:
            return state
        state_file.unlink()
    with byte_progress(sum(path.stat().st_size for path in files), "reading", shown) as bar:
        sample = read_all(files, options, workers, bar.update)
    lines = sample.kept.in_order()
    if not lines:
        raise UserError(f"--input {files[0]}: no text in it to train a tokenizer on")
    counts = np.zeros(_CODE_POINTS, np.int64)
    size = 0
    with atomic_file(work / _SENTENCES) as stream:
        for at in range(0, len(lines), _BLOCK_LINES):
            block = "\n".join(lines[at : at + _BLOCK_LINES]) + "\n"
            size += stream.write(block.encode("utf-8"))
            counts += np.bincount(np.frombuffer(block.encode("utf-32-le"), np.uint32), minlength=_CODE_POINTS)
    counts[ord("\n")] = 0
    atomic_write(work / _HELDOUT, json.dumps(sample.heldout.in_order(), ensure_ascii=False))
    state = {"identity": identity} | _describe(sample, len(lines), size, counts)
    atomic_write(state_file, json.dumps(state))
    return state


def _describe(sample: Sample, kept: int, size: int, counts: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        "documents": sample.documents,
        "characters": sample.characters,
        "heldout_documents": sample.heldout_documents,
        "sentences": sample.sentences,
        "cut_lines": sample.cut_lines,
        "sampled_sentences": kept,
        "sampled_bytes": size,
        "sampled_characters": int(counts.sum()),
        "different_characters": int(np.count_nonzero(counts)),
        "character_counts": counts[counts > 0].tolist(),
    }


def _train_options(options: BuildOptions, state: dict[str, Any]) -> TrainOptions:
    coverage = options.character_coverage
    if coverage is None:
        coverage = choose_coverage(np.array(state["character_counts"]), options.vocab_size, options.symbols.count)
    return TrainOptions(
        vocab_size=options.vocab_size,
        character_coverage=coverage,
        model_type=options.model_type,
        split_by_unicode_script=options.split_by_unicode_script,
        symbols=options.symbols,
    )


def _train(work: Path, state: dict[str, Any], training: TrainOptions, shown: bool | None) -> Trained:
    _warn_of_memory(state["sampled_bytes"])
    disable = None if shown is None else not shown
    bar = tqdm(total=training.vocab_size, desc="training", unit=" pieces", disable=disable, dynamic_ncols=True)
    # Only the log of bpe says how far it is.
    with bar if training.model_type == "bpe" else nullcontext() as progress:
        return train_model(work / _SENTENCES, state["sampled_sentences"], work / MODEL_FILE, training, progress)


def _warn_of_memory(size: int) -> None:
    """Say beforehand that training may end with a killed process."""
    needed, there = size * _MEMORY_PER_BYTE, psutil.virtual_memory().available
    if needed > there:
        print(
            f"warning: {size / 1e6:,.0f} MB of text can take {needed / 2**30:,.0f} GiB of memory to train on, "
            f"{there / 2**30:,.0f} GiB are free; fewer --input-sentences take less",
            file=sys.stderr,
        )


def _held_out_texts(work: Path, files: Sequence[Path], options: SampleOptions) -> list[tuple[str, str]]:
    if files:
        return sample_documents(files, options)
    return [(group, text) for group, text in json.loads((work / _HELDOUT).read_bytes())]


def _some_sentences(sentences: Path) -> list[str]:
    """Sentences from all over the sample, of about `_USED_TEXT_BYTES`."""
    every = max(1, sentences.stat().st_size // _USED_TEXT_BYTES)
    with sentences.open(encoding="utf-8", newline="\n") as stream:
        return [line.rstrip("\n") for number, line in enumerate(stream) if number % every == 0]


def _plain(options: BuildOptions) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(options)))
    return tree


def _dump(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False, indent=1) + "\n"
