"""Documents to token ids: JSON Lines in, a Megatron `.bin`/`.idx` pair out, by any number of processes."""

import multiprocessing
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.documents import check_input_files, parse_document
from megatron_moe.data.files import iterate_lines, open_stream
from megatron_moe.data.indexed import token_dtype
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.tokenizer.load import Tokenizer, load_tokenizer

# Large enough that passing a chunk to a process costs little, small enough that a few fit in memory many
# times.
_CHUNK_BYTES = 1 << 20
# Chunks under way per process. It bounds memory: reading waits for writing.
_CHUNKS_AHEAD = 3


@dataclass(frozen=True)
class Preprocessing:
    """What to do with every document.

    Attributes:
        data: names the tokenizer.
        vocab_size: for the NullTokenizer only.
        json_key: field of a line that holds the text.
        append_eod: end every document with the end-of-document id.
    """

    data: DataConfig
    vocab_size: int | None = None
    json_key: str = "text"
    append_eod: bool = True


@dataclass(frozen=True)
class PreprocessReport:
    """Totals of a run.

    Attributes:
        documents: documents written.
        empty: documents without any text, which are left out.
        tokens: ids written, ends of documents among them.
        characters: characters of text read.
        seconds: wall-clock time.
    """

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    characters: int = 0
    seconds: float = 0.0

    @property
    def chars_per_token(self) -> float:
        """Characters of text per id."""
        return self.characters / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class _Chunk:
    """Whole lines of one file."""

    path: Path
    first_line: int
    lines: list[bytes]
    bytes_read: int


@dataclass(frozen=True)
class _Encoded:
    """A chunk's ids: tokens [sum(lengths)], lengths [documents]."""

    tokens: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int32]
    empty: int
    characters: int


def preprocess(
    inputs: Sequence[Path],
    output_prefix: Path,
    job: Preprocessing,
    *,
    workers: int = 1,
    progress: bool | None = None,
) -> PreprocessReport:
    """Tokenize files in the given order into `<output_prefix>.bin` and `.idx`.

    The pair does not depend on `workers`, and appears only when all of it is written.

    Args:
        inputs: JSON Lines files, `.gz` too.
        output_prefix: path of the pair without ending.
        job: what to do with every document.
        workers: processes; 1 works in this one.
        progress: show a bar on stderr; None: if it is a terminal.

    Raises:
        UserError: a bad file or line, by name and number.
        ConfigError: a flag that cannot be.
    """
    started = time.monotonic()
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    check_input_files(inputs)
    tokenizer = load_tokenizer(job.data, job.vocab_size)
    report = PreprocessReport()
    total = sum(path.stat().st_size for path in inputs)
    # Without this, tqdm's monitor thread would be alive when the processes start.
    tqdm.monitor_interval = 0
    with (
        IndexedWriter(output_prefix, token_dtype(tokenizer.vocab_size)) as writer,
        tqdm(total=total, unit="B", unit_scale=True, disable=None if progress is None else not progress) as bar,
    ):
        for chunk, encoded in _encode_all(_chunks(inputs), tokenizer, job, workers):
            writer.add(encoded.tokens, encoded.lengths)
            bar.update(chunk.bytes_read)
            report = replace(
                report,
                documents=report.documents + len(encoded.lengths),
                empty=report.empty + encoded.empty,
                tokens=report.tokens + encoded.tokens.size,
                characters=report.characters + encoded.characters,
            )
        if report.documents == 0:
            raise UserError(f"--input {inputs[0]}: every document is empty")
    return replace(report, seconds=time.monotonic() - started)


def _chunks(inputs: Sequence[Path]) -> Iterator[_Chunk]:
    """The files cut into chunks of whole lines; where they are cut depends on the files alone."""
    for path in inputs:
        with open_stream(path) as (stream, position):
            lines: list[bytes] = []
            size, first, seen = 0, 1, 0
            for line in iterate_lines(stream, path):
                lines.append(line)
                size += len(line)
                if size >= _CHUNK_BYTES:
                    yield _Chunk(path, first, lines, position() - seen)
                    first, seen = first + len(lines), position()
                    lines, size = [], 0
            yield _Chunk(path, first, lines, position() - seen)


def _encode_all(
    chunks: Iterator[_Chunk], tokenizer: Tokenizer, job: Preprocessing, workers: int
) -> Iterator[tuple[_Chunk, _Encoded]]:
    """Every chunk with its ids, in the order of the chunks."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, _encode_chunk(chunk, tokenizer, job)
        return
    # spawn: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[_Chunk, Future[_Encoded]]] = deque()
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            for chunk in chunks:
                pending.append((chunk, pool.submit(_encode_in_worker, chunk)))
                if len(pending) >= workers * _CHUNKS_AHEAD:
                    ready, future = pending.popleft()
                    yield ready, future.result()
            for ready, future in pending:
                yield ready, future.result()
        finally:
            # After an error the queued chunks must not be worked through first.
            pool.shutdown(wait=True, cancel_futures=True)


# A worker process's tokenizer and job; it has no other state.
_worker: tuple[Tokenizer, Preprocessing] | None = None


def _start_worker(job: Preprocessing) -> None:
    global _worker
    _worker = (load_tokenizer(job.data, job.vocab_size), job)


def _encode_in_worker(chunk: _Chunk) -> _Encoded:
    if _worker is None:
        raise RuntimeError("the worker was not started by _start_worker")
    return _encode_chunk(chunk, *_worker)


def _encode_chunk(chunk: _Chunk, tokenizer: Tokenizer, job: Preprocessing) -> _Encoded:
    ids: list[int] = []
    lengths: list[int] = []
    empty = characters = 0
    for number, line in enumerate(chunk.lines, start=chunk.first_line):
        text = parse_document(line, job.json_key, chunk.path, number)
        try:
            document = tokenizer.encode(text)
        except UserError as error:
            raise UserError(f"{chunk.path} line {number}: {error}") from error
        if not document:
            empty += 1
            continue
        if job.append_eod:
            document.append(tokenizer.eod)
        characters += len(text)
        lengths.append(len(document))
        ids.extend(document)
    return _Encoded(
        tokens=np.array(ids, dtype=token_dtype(tokenizer.vocab_size)),
        lengths=np.array(lengths, dtype=np.int32),
        empty=empty,
        characters=characters,
    )
