"""A worker: one piece of the input to the files of one finished part."""

import contextlib
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError, disk_error
from megatron_moe.config.model import MOST_DOMAINS
from megatron_moe.data.domains import DTYPE
from megatron_moe.data.preprocess.encode import Encoded, encode_texts
from megatron_moe.data.preprocess.job import Preprocessing, Totals
from megatron_moe.data.preprocess.read import Batch, InputReader
from megatron_moe.data.preprocess.tasks import Task
from megatron_moe.data.preprocess.workspace import Done, Workspace
from megatron_moe.data.tokenizer.load import Tokenizer, load_tokenizer


class PartWriter:
    """Makes parts, one after the other. Every process has one of its own.

    Args:
        job: what to do with every document.
        workspace: where parts go.
        tokenizer: loaded here unless it is given.
    """

    def __init__(self, job: Preprocessing, workspace: Workspace, tokenizer: Tokenizer | None = None) -> None:
        self._job = job
        self._workspace = workspace
        self._tokenizer = tokenizer or load_tokenizer(job.data, job.vocab_size)
        self._reader = InputReader(job.json_keys, job.max_document_bytes, job.domain_key)

    def __call__(self, task: Task) -> Done:
        """Tokenize a piece of the input, and leave its part.

        Raises:
            UserError: a record that cannot be used, or no room on the disk.
        """
        totals = [Totals() for _ in self._job.json_keys]
        lines = 0
        numbers = DomainNumbers(self._job)
        with contextlib.ExitStack() as files:
            columns = [
                files.enter_context(_Columns(self._workspace, task, place, self._job)) for place in range(len(totals))
            ]
            for batch in self._reader.read(task):
                lines += len(batch)
                domains = numbers.of(batch)
                for place, texts in enumerate(batch.texts):
                    encoded = encode_batch(batch, texts, self._tokenizer, self._job)
                    columns[place].write(encoded, domains)
                    totals[place] += encoded.totals
        ended, position = self._reader.stream_state(task)
        checksums = tuple(column.checksums for column in columns)
        done = Done(tuple(totals), lines, checksums, ended, position, numbers.names)
        self._workspace.write_done(task.name, done)
        return done


class DomainNumbers:
    """Numbers of the domains of records: those of --domains, or in the order in which names occur.

    Args:
        job: says which field they stand in, if any.
    """

    def __init__(self, job: Preprocessing) -> None:
        self._job = job
        self._numbers = {name: number for number, name in enumerate(job.domains or ())}

    @property
    def names(self) -> tuple[str, ...]:
        """In the order of their numbers."""
        return tuple(self._numbers)

    def of(self, batch: Batch) -> npt.NDArray[np.uint16] | None:
        """[records]; None without --domain-key.

        Raises:
            UserError: a domain that --domains does not name, or more than there can be; names the record.
        """
        if batch.domains is None:
            return None
        for place, name in enumerate(batch.domains):
            if name in self._numbers:
                continue
            if self._job.domains is not None:
                known = " ".join(self._job.domains)
                raise UserError(f"{batch.name(place)}: domain {name!r} is none of --domains {known}")
            if len(self._numbers) == MOST_DOMAINS:
                raise UserError(
                    f"{batch.name(place)}: --domain-key {self._job.domain_key} has more than {MOST_DOMAINS:,} "
                    "different values; name a field that tells few kinds of text apart"
                )
            self._numbers[name] = len(self._numbers)
        return np.fromiter((self._numbers[name] for name in batch.domains), DTYPE, len(batch.domains))


def encode_batch(batch: Batch, texts: list[str], tokenizer: Tokenizer, job: Preprocessing) -> Encoded:
    """One field of a batch, tokenized.

    Raises:
        UserError: the tokenizer does not take a text; names its record.
    """
    try:
        return encode_texts(texts, tokenizer, job)
    except UserError:
        # Once more one by one, to find out which.
        for place, text in enumerate(texts):
            try:
                encode_texts([text], tokenizer, job)
            except UserError as error:
                raise UserError(f"{batch.name(place)}: {error}") from error
        raise


class _Columns:
    """The files of one part and field, which get their names when all of them are whole."""

    def __init__(self, workspace: Workspace, task: Task, place: int, job: Preprocessing) -> None:
        names = job.columns
        self._names = names
        self._where = workspace.where
        self._paths = [workspace.column(task.name, place, column) for column in names]
        self._files: dict[Path, BinaryIO] = {}
        self._checksums = [0] * len(names)

    @property
    def checksums(self) -> tuple[int, ...]:
        """crc32 of what was written to each column."""
        return tuple(self._checksums)

    def __enter__(self) -> "_Columns":
        try:
            for path in self._paths:
                self._files[path] = self._temporary(path).open("wb")
        except OSError as error:
            self._remove()
            raise disk_error(self._where, error) from error
        return self

    def write(self, encoded: Encoded, domains: npt.NDArray[np.uint16] | None) -> None:
        """Append to every column."""
        values: dict[str, npt.NDArray[np.generic]] = {
            "bin": encoded.tokens,
            "lengths": encoded.lengths,
            "documents": encoded.documents,
        }
        if domains is not None:
            values["domains"] = domains[encoded.written]
        try:
            for place, (name, file) in enumerate(zip(self._names, self._files.values(), strict=True)):
                content = values[name].tobytes()
                file.write(content)
                self._checksums[place] = zlib.crc32(content, self._checksums[place])
        except OSError as error:
            raise disk_error(self._where, error) from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for path, file in self._files.items():
                    file.close()
                    self._temporary(path).rename(path)
        except OSError as error:
            raise disk_error(self._where, error) from error
        finally:
            self._remove()

    def _temporary(self, path: Path) -> Path:
        return path.with_name(f"{path.name}.{os.getpid()}.tmp")

    def _remove(self) -> None:
        for path, file in self._files.items():
            # Closing tries once more what a failed write has left in the buffer.
            with contextlib.suppress(OSError):
                file.close()
            self._temporary(path).unlink(missing_ok=True)
