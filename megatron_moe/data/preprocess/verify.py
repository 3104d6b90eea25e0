"""Comparing pairs with the text they were made of, along another way than they were made.

Every text is tokenized once more, one at a time with `encode`, cut and ended in plain Python; what it gives must stand
in the pairs bit for bit, and every line of the input must have been seen. Digests are compared, piece by piece, so that
many processes can work on it and memory stays small.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.data.command_line import byte_progress
from megatron_moe.data.domains import DTYPE, check_same_names, read_domains
from megatron_moe.data.files import base_suffix, iterate_lines, open_stream
from megatron_moe.data.indexed import read_header, token_dtype
from megatron_moe.data.indexed_stream import PairReader
from megatron_moe.data.pool import run_tasks
from megatron_moe.data.preprocess.job import Preprocessing
from megatron_moe.data.preprocess.parquet import row_count
from megatron_moe.data.preprocess.read import Batch, InputReader
from megatron_moe.data.preprocess.sentences import split_sentences
from megatron_moe.data.preprocess.tasks import Plan, Task
from megatron_moe.data.tokenizer.load import Tokenizer, load_tokenizer

_FLAG = "verify"
_READ = 1 << 20


@dataclass(frozen=True)
class _Expected:
    """What a piece of the input gives in one field; digests of ids, tokens of sequences, sequences of documents and
    domains."""

    documents: int
    sequences: int
    tokens: int
    digests: tuple[str, ...]


def expected_document(text: str, tokenizer: Tokenizer, job: Preprocessing) -> list[list[int]]:
    """The sequences of one document; none for an empty one."""
    sentences = split_sentences(text) if job.split_sentences else [text]
    room = None if job.max_length is None else job.max_length - job.append_eod
    sequences = []
    for sentence in sentences:
        ids = tokenizer.encode(sentence)[:room]
        if room is not None:
            room -= len(ids)
        if ids:
            sequences.append(ids)
    if sequences and job.append_eod:
        sequences[-1] = [*sequences[-1], tokenizer.eod]
    return sequences


def verify(inputs: Sequence[Path], pairs: dict[str, list[Path]], job: Preprocessing, workers: int = 1) -> int:
    """Compare pairs with their input.

    Args:
        inputs: the files, in order.
        pairs: the prefixes of each field, shards in order.
        job: how they were made.
        workers: processes.

    Returns:
        Documents compared, of all fields.

    Raises:
        UserError: they differ; names the pair, the document and the record of the first difference.
    """
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    tokenizer = load_tokenizer(job.data, job.vocab_size)
    plan = Plan(inputs)
    if job.domain_key is not None:
        # As the pairs number them: names are compared with those of the input, whatever their numbers.
        job = dataclasses.replace(job, domains=_domain_names(pairs))
    records: dict[Path, int] = dict.fromkeys(inputs, 0)
    with contextlib.ExitStack() as files:
        cursors = [files.enter_context(_Cursor(pairs[key], tokenizer, job)) for key in job.json_keys]
        for task, (lines, fields) in _in_order(plan, job, workers):
            records[task.path] += lines
            for cursor, expected, place in zip(cursors, fields, range(len(fields)), strict=True):
                if not cursor.agrees(expected):
                    cursor.rewind()
                    _name_difference(task, place, cursor, tokenizer, job)
        for cursor in cursors:
            cursor.check_end()
        _check_records(records)
        return sum(cursor.documents for cursor in cursors)


class _Checker:
    """A worker: what a piece of the input must have given."""

    def __init__(self, job: Preprocessing) -> None:
        self._job = job
        self._tokenizer = load_tokenizer(job.data, job.vocab_size)
        self._reader = InputReader(job.json_keys, job.max_document_bytes, job.domain_key)

    def __call__(self, task: Task) -> tuple[int, list[_Expected], bool, int]:
        digests = [_Digest(token_dtype(self._tokenizer.vocab_size)) for _ in self._job.json_keys]
        lines = 0
        for batch in self._reader.read(task):
            lines += len(batch)
            domains = _expected_domains(batch, self._job)
            for digest, texts in zip(digests, batch.texts, strict=True):
                for place, text in enumerate(texts):
                    digest.add(
                        expected_document(text, self._tokenizer, self._job),
                        domains[place : place + 1] if domains else [],
                    )
        ended, position = self._reader.stream_state(task)
        return lines, [digest.result() for digest in digests], ended, position


class _Digest:
    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._hashes = [hashlib.blake2b(digest_size=16) for _ in range(4)]
        self._counts = [0, 0, 0, 0]

    def add(self, sequences: list[list[int]], domains: list[int]) -> None:
        """Take in a document and its domain, if it has one, unless it is empty."""
        if sequences:
            ids = np.array([index for sequence in sequences for index in sequence], self._dtype)
            self.add_columns(
                ids,
                np.array(list(map(len, sequences)), "<i4"),
                np.array([len(sequences)], "<i4"),
                np.array(domains, DTYPE),
            )

    def add_columns(self, *columns: npt.NDArray[np.integer]) -> None:
        """Take in ids, tokens of sequences, sequences of documents, and domains."""
        for place, values in enumerate(columns):
            self._hashes[place].update(values.tobytes())
            self._counts[place] += len(values)

    def result(self) -> _Expected:
        """All that was taken in."""
        tokens, sequences, documents, _ = self._counts
        return _Expected(documents, sequences, tokens, tuple(digest.hexdigest() for digest in self._hashes))


def _in_order(plan: Plan, job: Preprocessing, workers: int) -> Generator[tuple[Task, tuple[int, list[_Expected]]]]:
    """The pieces in the order of the input, as soon as each one's turn has come."""
    results: dict[str, tuple[int, list[_Expected]]] = {}
    order = iter(plan)
    upcoming = next(order, None)
    total = sum(path.stat().st_size for path in plan.inputs)
    positions: dict[Path, int] = {}
    with (
        byte_progress(total, "verifying") as bar,
        contextlib.closing(run_tasks(_Checker, (job,), iter(plan), workers)) as checked,
    ):
        for task, (lines, fields, ended, position) in checked:
            if ended:
                plan.ended(task)
            results[task.name] = lines, fields
            bar.update(task.share + max(0, position - positions.get(task.path, 0)))
            positions[task.path] = max(position, positions.get(task.path, 0))
            while upcoming is not None and upcoming.name in results:
                yield upcoming, results.pop(upcoming.name)
                upcoming = next(order, None)
    plan.check_unchanged()


class _Cursor:
    """The shards of a field, read forward."""

    def __init__(self, prefixes: Sequence[Path], tokenizer: Tokenizer, job: Preprocessing) -> None:
        self._job = job
        self._prefixes = prefixes
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._files = contextlib.ExitStack()
        self._pairs: list[PairReader] = []
        self.documents = 0
        self._before = 0

    def __enter__(self) -> "_Cursor":
        for prefix in self._prefixes:
            pair = self._files.enter_context(PairReader(prefix, _FLAG))
            self._pairs.append(pair)
            if pair.header.dtype != self._dtype:
                self._files.close()
                raise UserError(f"{pair.where}: stores {pair.header.dtype}, this tokenizer needs {self._dtype}")
        self._tokens = _Bytes(_all_tokens(self._pairs))
        self._lengths = _Bytes(block.tobytes() for pair in self._pairs for block in pair.lengths())
        self._counts = _Bytes(_all_counts(self._pairs))
        self._domains = _Bytes(_all_domains(self._pairs) if self._job.domain_key is not None else iter(()))
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def agrees(self, expected: _Expected) -> bool:
        """Go over the documents of a piece: whether they are the expected ones."""
        columns = (
            (self._tokens, expected.tokens * self._dtype.itemsize),
            (self._lengths, 4 * expected.sequences),
            (self._counts, 4 * expected.documents),
            (self._domains, DTYPE.itemsize * expected.documents if self._job.domain_key is not None else 0),
        )
        found = tuple(column.digest(size) for column, size in columns)
        self._before = self.documents
        self.documents += expected.documents
        return found == expected.digests

    def rewind(self) -> None:
        """Go back to the first document of the piece before."""
        self.documents = self._before

    def next_document(self) -> list[list[int]] | None:
        """The sequences of the next document; None at the end."""
        index = self.documents
        for pair in self._pairs:
            if index < pair.header.documents:
                self.documents += 1
                return [sequence.tolist() for sequence in pair.document(index)]
            index -= pair.header.documents
        return None

    def domain(self, index: int) -> int | None:
        """Of a document; None at the end."""
        for pair in self._pairs:
            if index < pair.header.documents:
                return int(read_domains(pair.prefix, pair.header.documents, _FLAG).ids[index])
            index -= pair.header.documents
        return None

    def check_end(self) -> None:
        """Nothing may follow."""
        total = sum(pair.header.documents for pair in self._pairs)
        rest = [column.rest() for column in (self._tokens, self._lengths, self._counts, self._domains)]
        if total != self.documents or any(rest):
            raise UserError(
                f"{self._pairs[-1].where}: holds {total:,} documents, but the input gives {self.documents:,}"
            )

    @property
    def where(self) -> str:
        """How errors name the field's pair."""
        return self._pairs[0].where


class _Bytes:
    """A stream of bytes made of blocks."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def digest(self, size: int) -> str:
        """Of the next so many bytes, or of those that there still are."""
        digest = hashlib.blake2b(digest_size=16)
        while size:
            if not self._rest:
                block = next(self._blocks, None)
                if block is None:
                    break
                self._rest = memoryview(block)
            digest.update(self._rest[:size])
            taken = min(size, len(self._rest))
            self._rest = self._rest[taken:]
            size -= taken
        return digest.hexdigest()

    def rest(self) -> bool:
        """Whether any bytes are left. Reads on to the end, which checks what was not compared."""
        left = len(self._rest)
        for block in self._blocks:
            left += len(block)
        return left > 0


def _all_tokens(pairs: Sequence[PairReader]) -> Iterator[bytes]:
    for pair in pairs:
        position = 0
        # `document` moves the same file.
        while pair.tokens.seek(position) >= 0 and (block := pair.tokens.read(_READ)):
            position += len(block)
            yield block


def _all_counts(pairs: Sequence[PairReader]) -> Iterator[bytes]:
    for pair in pairs:
        last = 0
        for ends in pair.document_ends():
            yield np.diff(ends, prepend=last).astype("<i4").tobytes()
            last = int(ends[-1])


def _all_domains(pairs: Sequence[PairReader]) -> Iterator[bytes]:
    for pair in pairs:
        ids = read_domains(pair.prefix, pair.header.documents, _FLAG).ids
        for start in range(0, len(ids), _READ):
            yield ids[start : start + _READ].tobytes()


def _domain_names(pairs: dict[str, list[Path]]) -> tuple[str, ...]:
    prefixes = [prefix for several in pairs.values() for prefix in several]
    domains = [read_domains(prefix, read_header(prefix, _FLAG).documents, _FLAG) for prefix in prefixes]
    check_same_names(domains, _FLAG)
    return domains[0].names


def _expected_domains(batch: Batch, job: Preprocessing) -> list[int]:
    """Numbers of the records' domains; none where they have none."""
    if batch.domains is None or job.domains is None:
        return []
    unknown = next((place for place, name in enumerate(batch.domains) if name not in job.domains), None)
    if unknown is not None:
        known = ", ".join(job.domains)
        raise UserError(f"{batch.name(unknown)}: domain {batch.domains[unknown]!r}, but the pair knows only {known}")
    return [job.domains.index(name) for name in batch.domains]


def _name_difference(task: Task, place: int, cursor: _Cursor, tokenizer: Tokenizer, job: Preprocessing) -> None:
    """Raise an error that names the first document of a piece that is not as expected."""
    for batch in InputReader(job.json_keys, job.max_document_bytes, job.domain_key).read(task):
        domains = _expected_domains(batch, job)
        for number, text in enumerate(batch.texts[place]):
            expected = expected_document(text, tokenizer, job)
            if not expected:
                continue
            index = cursor.documents
            found = cursor.next_document()
            if found != expected:
                raise UserError(
                    f"{cursor.where}: document {index} is not {batch.name(number)}: {_describe(found)}, "
                    f"expected {_describe(expected)}"
                )
            if domains and job.domains and (domain := cursor.domain(index)) != domains[number]:
                shown = "missing" if domain is None else job.domains[domain]
                raise UserError(
                    f"{cursor.where}: the domain of document {index} is {shown}, {batch.name(number)} says "
                    f"{job.domains[domains[number]]}"
                )
    raise UserError(f"{cursor.where}: the documents of {task.path} are there, but the index divides them otherwise")


def _describe(sequences: list[list[int]] | None) -> str:
    if sequences is None:
        return "the pair ends before it"
    ids = [index for sequence in sequences for index in sequence]
    start = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
    return f"{len(ids)} tokens in {len(sequences)} sequences ({start})"


def _check_records(seen: dict[Path, int]) -> None:
    """Count the lines anew, without the code that cuts files into pieces."""
    for path, count in seen.items():
        if base_suffix(path) == ".parquet":
            expected = row_count(path)
        else:
            with open_stream(path) as (stream, _):
                expected = sum(1 for _ in iterate_lines(stream, path))
        if expected != count:
            raise UserError(f"{path}: has {expected:,} records, but {count:,} were read; please report this as a bug")
