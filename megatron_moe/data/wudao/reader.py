"""Documents of one piece of an input file, in batches; what cannot be read is reported, never raised.

A piece is a whole file, a range of bytes that begins and ends between records (`cut_objects` finds where), a range of
bytes of JSON Lines (a line belongs to the range that it starts in), or some row groups of a Parquet file.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_moe.data.wudao.document import Document
from megatron_moe.data.wudao.lines import LineScanner
from megatron_moe.data.wudao.objects import Fault, ObjectScanner, Record, Report
from megatron_moe.data.wudao.rows import row_records
from megatron_moe.data.wudao.source import Source, open_bytes

# A record of WuDao: id, uniqueKey, titleUkey, dataType, title, content.
WUDAO_FIELDS = ("id", "uniqueKey", "titleUkey", "dataType", "title", "content")
# Characters or documents in a batch, whichever is reached first: enough to share the cost of a call, little memory.
_BATCH_CHARACTERS = 1 << 19
_BATCH_DOCUMENTS = 512
_HEAD = 200
_NAMES = {
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class ReadOptions:
    """How to read records.

    Attributes:
        text_key: the field with the text.
        title_key: the field with the title.
        longest_record: bytes; a longer one is lost. It bounds memory: a record being cleaned exists several times.
    """

    text_key: str = "content"
    title_key: str = "title"
    longest_record: int = 16 << 20

    @property
    def fields(self) -> tuple[str, ...]:
        """Names that the first field of a record may have."""
        return tuple(dict.fromkeys((*WUDAO_FIELDS, self.text_key, self.title_key)))


@dataclass(frozen=True)
class Piece:
    """A part of an input file that one task works on.

    Attributes:
        source: the file.
        start, end: uncompressed bytes, or row groups of Parquet; no end means the file's.
    """

    source: Source
    start: int
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Some documents that follow each other, and how far the file was read: bytes on disk since the piece began."""

    documents: list[Document]
    bytes_read: int


class PieceReader:
    """Reads the documents of a piece in their order.

    Args:
        piece: what to read.
        options: how.
        report: told of everything that could not be read, or only after mending.
        columns: of Parquet, beside text and title; records of JSON are read whole.
    """

    def __init__(
        self, piece: Piece, options: ReadOptions, report: Report, columns: Sequence[str] = WUDAO_FIELDS
    ) -> None:
        self._piece = piece
        self._options = options
        self._report = report
        self._columns = (options.title_key, *columns)
        self._disk_bytes = 0

    def __iter__(self) -> Iterator[Batch]:
        documents: list[Document] = []
        characters = 0
        for offset, size, value in self._records():
            document = to_document(value, self._options, self._report, offset, size)
            if document is None:
                continue
            documents.append(document)
            characters += len(document.text)
            if characters >= _BATCH_CHARACTERS or len(documents) >= _BATCH_DOCUMENTS:
                yield Batch(documents, self._disk_bytes)
                documents, characters = [], 0
        yield Batch(documents, self._disk_bytes)

    def _records(self) -> Iterator[Record]:
        piece, options = self._piece, self._options
        if piece.source.form == "empty":
            self._report(Fault(0, 0, "empty file", "there is nothing in it", b""))
        elif piece.source.form == "parquet":
            yield from row_records(
                piece.source.path, piece.start, piece.end, options.text_key, self._columns, self._report
            )
        else:
            yield from self._scanned()

    def _scanned(self) -> Iterator[Record]:
        piece, options, source = self._piece, self._options, self._piece.source
        lines = source.form == "lines"
        begin = max(piece.start, source.body)
        # A line belongs to the range that it starts in: the byte before tells whether one starts right here.
        partial = lines and begin > source.body
        begin -= partial
        left = None if piece.end is None or lines else piece.end - begin
        seen = begin

        def damaged(error: str, place: int) -> None:
            self._report(Fault(place, 0, "damaged file", f"cannot be read to the end: {error}", b""))

        def read(size: int) -> bytes:
            nonlocal left, seen
            data = read_bytes(size if left is None else min(size, left))
            seen += len(data)
            if left is not None:
                left -= len(data)
            self._disk_bytes = disk_bytes() if source.compression else seen - piece.start
            return data

        with open_bytes(source, begin, damaged) as (read_bytes, disk_bytes):
            scan = (read, begin, self._report, options.fields, options.longest_record)
            if lines:
                yield from LineScanner(*scan, end=piece.end, partial=partial)
                return
            scanner = ObjectScanner(*scan)
            yield from scanner
            if source.array and not scanner.closed and self._ends_file(begin):
                detail = "the array is not closed with ]: was the file cut?"
                self._report(Fault(seen, 0, "damaged file", detail, b"", kept=True))

    def _ends_file(self, begin: int) -> bool:
        end = self._piece.end
        return end is None or begin < end == self._piece.source.path.stat().st_size


def to_document(value: Any, options: ReadOptions, report: Report, offset: int, size: int) -> Document | None:
    """The document that a record stands for; None, after a report, where it is none."""

    def fault(reason: str, detail: str, kept: bool = False) -> None:
        report(Fault(offset, size, reason, detail, repr(value).encode("utf-8", "replace")[:_HEAD], kept))

    if type(value) is not dict:
        fault("not a record", f"expected an object, got {_name(value)}")
        return None
    if options.text_key not in value:
        fault("no text", f"no field {options.text_key!r} (--text-key); fields: {', '.join(sorted(value)) or 'none'}")
        return None
    text = value[options.text_key]
    if type(text) is not str:
        fault("wrong type", f"{options.text_key!r} is {_name(text)}, not text")
        return None
    title = value.get(options.title_key)
    if type(title) is not str:
        if title is not None:
            fault("wrong type", f"{options.title_key!r} is {_name(title)}, not text; left out", kept=True)
        title = ""
    del value[options.text_key]
    value.pop(options.title_key, None)
    return Document(text, title, value)


def _name(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)


def cut_objects(
    source: Source, size: int, count: int, options: ReadOptions, progress: Callable[[int], object]
) -> list[int]:
    """Where to cut a plain file of JSON objects into `count` ranges: only a reader from the start knows for certain.

    Args:
        source: the file.
        size: its bytes.
        count: into how many ranges.
        options: how its records are read.
        progress: told how far it is read.

    Returns:
        count + 1 offsets: the body's start, the first record at or after each equal share of the file, its end.
    """
    wanted = [size * number // count for number in range(1, count)]
    cuts: list[int] = []
    with open_bytes(source, source.body, _ignore) as (read, _):
        for offset, _, _ in ObjectScanner(read, source.body, _ignore, options.fields, options.longest_record):
            while len(cuts) < len(wanted) and offset >= wanted[len(cuts)]:
                cuts.append(offset)
                progress(offset)
            if len(cuts) == len(wanted):
                break
    return [source.body, *cuts, *[size] * (count - len(cuts))]


def _ignore(*_: object) -> None:
    """The task that cleans the range comes to the same fault, and reports it."""
