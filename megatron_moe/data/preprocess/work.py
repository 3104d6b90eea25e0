"""A worker: one piece of the input to the files of one finished part."""

import contextlib
import os
import zlib
from pathlib import Path
from typing import BinaryIO

from megatron_moe.config.base import UserError, disk_error
from megatron_moe.data.preprocess.encode import Encoded, encode_texts
from megatron_moe.data.preprocess.job import Preprocessing, Totals
from megatron_moe.data.preprocess.read import Batch, InputReader
from megatron_moe.data.preprocess.tasks import Task
from megatron_moe.data.preprocess.workspace import COLUMNS, Done, Workspace
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
        self._reader = InputReader(job.json_keys, job.max_document_bytes)

    def __call__(self, task: Task) -> Done:
        """Tokenize a piece of the input, and leave its part.

        Raises:
            UserError: a record that cannot be used, or no room on the disk.
        """
        totals = [Totals() for _ in self._job.json_keys]
        lines = 0
        with contextlib.ExitStack() as files:
            columns = [
                files.enter_context(_Columns(self._workspace, task, place, self._job)) for place in range(len(totals))
            ]
            for batch in self._reader.read(task):
                lines += len(batch)
                for place, texts in enumerate(batch.texts):
                    encoded = encode_batch(batch, texts, self._tokenizer, self._job)
                    columns[place].write(encoded)
                    totals[place] += encoded.totals
        ended, position = self._reader.stream_state(task)
        done = Done(tuple(totals), lines, tuple(column.checksums for column in columns), ended, position)
        self._workspace.write_done(task.name, done)
        return done


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
        names = COLUMNS if job.split_sentences else COLUMNS[:-1]
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

    def write(self, encoded: Encoded) -> None:
        """Append to every column."""
        try:
            every_column = (encoded.tokens, encoded.lengths, encoded.documents)
            for place, (file, values) in enumerate(zip(self._files.values(), every_column, strict=False)):
                content = values.tobytes()
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
