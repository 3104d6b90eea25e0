"""The records of a piece of the input, in batches, with errors that name file and line."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_moe.config.base import UserError
from megatron_moe.data.documents import check_text, parse_document, plain_line
from megatron_moe.data.files import base_suffix, open_stream
from megatron_moe.data.preprocess.lines import LineReader, count_lines
from megatron_moe.data.preprocess.parquet import read_rows
from megatron_moe.data.preprocess.tasks import Task

try:
    from orjson import loads as _fast_loads
except ImportError:
    # It is only faster: what it does not take is read by `parse_document` in any case.
    def _fast_loads(line: bytes | bytearray | memoryview | str, /) -> Any:
        raise ValueError


# JSON may spell a byte of text in two: `\u4e2d` for three. And a line holds other fields than text.
_LINE_BYTES_PER_TEXT_BYTE = 4


@dataclass(frozen=True)
class Batch:
    """Some records.

    Attributes:
        texts: for each field, the text of each record.
        domains: the domain of each record; None without --domain-key.
        name: says which record stands at a place here, as `FILE line 17`.
    """

    texts: list[list[str]]
    name: Callable[[int], str]
    domains: list[str] | None = None

    def __len__(self) -> int:
        return len(self.texts[0])


@dataclass
class _Open:
    """A stream that was left at the end of a piece."""

    path: Path
    context: AbstractContextManager[Any]
    reader: LineReader
    position: Callable[[], int]
    done_to: int = 0


class InputReader:
    """Reads pieces. A compressed file stays open between two of them, so that it is unpacked only once.

    Args:
        keys: fields with text.
        max_document_bytes: longer texts are errors.
        domain_key: field with the record's domain.
    """

    def __init__(self, keys: Sequence[str], max_document_bytes: int, domain_key: str | None = None) -> None:
        self._keys = (*keys, domain_key) if domain_key is not None else tuple(keys)
        self._domain_key = domain_key
        self._max_document_bytes = max_document_bytes
        self._open: _Open | None = None

    def read(self, task: Task) -> Iterator[Batch]:
        """The records of a piece.

        Raises:
            UserError: naming file and line of what cannot be used.
        """
        batches = self._rows(task) if task.parquet else self._lines(task)
        for batch in batches:
            for texts in batch.texts:
                self._check_sizes(texts, batch)
            yield batch

    def stream_state(self, task: Task) -> tuple[bool, int]:
        """After a piece of a compressed file: whether its end was seen, and bytes of it on the disk read so far."""
        if not task.compressed or self._open is None:
            return False, 0
        return self._open.reader.ended, self._open.position()

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            self._open.context.__exit__(None, None, None)
            self._open = None

    def _rows(self, task: Task) -> Iterator[Batch]:
        for first, columns in read_rows(task.path, self._keys, task.start, task.stop):

            def name(place: int, first: int = first) -> str:
                return f"{task.path} row {first + place}"

            for key, values in zip(self._keys, columns, strict=True):
                for place, value in enumerate(values):
                    check_text(value, key, name(place))
            yield self._batch(columns, name)

    def _lines(self, task: Task) -> Iterator[Batch]:
        plain_text = base_suffix(task.path) == ".txt"
        if plain_text and len(self._keys) > 1:
            flag = f"--domain-key {self._domain_key}" if self._domain_key else f"--json-keys {' '.join(self._keys)}"
            raise UserError(f"{flag}: {task.path} is plain text and has no fields")
        reader = self._reader(task)
        if task.number == 0 and not plain_text and reader.begins_with(b"["):
            raise UserError(
                f"{task.path}: is a JSON array, not JSON Lines; tools/clean_wudao.py reads arrays of records"
            )
        reader.skip_to(task.start)
        for first, lines in reader.batches(task.stop):

            def number(place: int, first: int = first) -> int:
                return _lines_before(task) + first + place

            def name(place: int, number: Callable[[int], int] = number) -> str:
                return f"{task.path} line {number(place)}"

            if plain_text:
                yield Batch([[_plain(line, task.path, number, place) for place, line in enumerate(lines)]], name)
            else:
                yield self._batch(self._parse(lines, task.path, number), name)
        if self._open is not None:
            self._open.done_to = task.stop

    def _parse(self, lines: list[bytes], path: Path, number: Callable[[int], int]) -> list[list[str]]:
        faultless = _fast_columns(lines, self._keys)
        if faultless is not None:
            return faultless
        columns: list[list[str]] = [[] for _ in self._keys]
        for place, line in enumerate(lines):
            one = _fast_columns([line], self._keys)
            for key, column in enumerate(columns):
                column.append(one[key][0] if one else self._value(line, self._keys[key], path, number(place)))
        return columns

    def _value(self, line: bytes, key: str, path: Path, number: int) -> str:
        return parse_document(line, key, path, number, self._flag(key))

    def _batch(self, columns: list[list[str]], name: Callable[[int], str]) -> Batch:
        return Batch(columns, name) if self._domain_key is None else Batch(columns[:-1], name, columns[-1])

    def _flag(self, key: str) -> str:
        return "--domain-key" if key == self._domain_key else "--json-key"

    def _check_sizes(self, texts: list[str], batch: Batch) -> None:
        # A character has at most four bytes.
        if max(map(len, texts), default=0) * 4 <= self._max_document_bytes:
            return
        for place, text in enumerate(texts):
            if len(text.encode()) > self._max_document_bytes:
                raise UserError(
                    f"{batch.name(place)}: a text of {len(text.encode()):,} bytes, over --max-document-bytes "
                    f"{self._max_document_bytes:,}; divide it, or raise the limit (and with it the memory needed)"
                )

    def _reader(self, task: Task) -> LineReader:
        limit = self._max_document_bytes * _LINE_BYTES_PER_TEXT_BYTE
        left = self._open
        if left is not None and left.path == task.path and task.compressed and left.done_to <= task.start:
            return left.reader
        self.close()
        context = open_stream(task.path)
        stream, position = context.__enter__()
        start = 0
        if not task.compressed and task.start:
            start = task.start - 1
            stream.seek(start)
        reader = LineReader(stream, task.path, limit, start)
        self._open = _Open(task.path, context, reader, position)
        return reader


def _fast_columns(lines: Sequence[bytes], keys: Sequence[str]) -> list[list[str]] | None:
    """The texts of faultless records, else None; orjson refuses all that is not Unicode."""
    try:
        records = [_fast_loads(line) for line in lines]
        columns = [[record[key] for record in records] for key in keys]
    except (ValueError, KeyError, TypeError):
        return None
    return columns if all(set(map(type, column)) <= {str} for column in columns) else None


def _plain(line: bytes, path: Path, number: Callable[[int], int], place: int) -> str:
    try:
        text = line.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError:
        return plain_line(line, path, number(place))
    # Perhaps a byte order mark.
    return plain_line(line, path, number(place)).removesuffix("\r") if text.startswith("\ufeff") else text


def _lines_before(task: Task) -> int:
    """Lines before those that a reader of a piece counts. Only errors ask."""
    if task.compressed or task.start == 0:
        return 0
    stream: IO[bytes]
    with open_stream(task.path) as (stream, _):
        return count_lines(stream, task.start - 1)
