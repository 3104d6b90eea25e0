"""Find the records of JSON Lines in a stream of bytes: a damaged line costs itself alone."""

import io
from collections.abc import Callable, Iterator

import orjson

from megatron_moe.data.wudao.objects import Fault, ObjectScanner, Record, Report

_CHUNK = 1 << 22
_HEAD = 200


class LineScanner:
    """Finds the objects that stand one a line.

    Args:
        read: gives the next bytes of the stream, none at its end.
        offset: where the stream begins in the file.
        report, fields, limit: see `ObjectScanner`.
        end: lines that start here or later belong to others; None for no end.
        partial: the stream begins inside a line that belongs to others, or with its newline.
    """

    def __init__(
        self,
        read: Callable[[int], bytes],
        offset: int,
        report: Report,
        fields: tuple[str, ...],
        limit: int,
        end: int | None = None,
        partial: bool = False,
    ) -> None:
        self._read = read
        self._offset = offset
        self._end = end
        self._partial = partial
        self._report = report
        self._fields = fields
        self._limit = limit

    def __iter__(self) -> Iterator[Record]:
        loads = orjson.loads
        for offset, line in self._lines():
            try:
                value = loads(line)
            except orjson.JSONDecodeError:
                if line.strip():
                    # Mended, or found among junk, or two in a line.
                    stream = io.BytesIO(line)
                    yield from ObjectScanner(stream.read, offset, self._report, self._fields, self._limit)
                continue
            yield offset, len(line), value

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Every line of the range with its offset; one over the limit is reported, and never held."""
        limit, end, offset, skip = self._limit, self._end, self._offset, self._partial
        rest, head, too_long = b"", b"", 0
        while data := self._read(_CHUNK):
            lines = (rest + data).split(b"\n")
            rest = lines.pop()
            for line in lines:
                if end is not None and offset >= end:
                    return
                size = too_long + len(line)
                if skip:
                    skip = False
                elif size > limit:
                    self._too_long(offset, size, head or line)
                else:
                    yield offset, line
                offset += size + 1
                too_long, head = 0, b""
            if too_long or len(rest) > limit:
                if end is not None and offset >= end:
                    return
                head = head or rest[:_HEAD]
                too_long += len(rest)
                rest = b""
        size = too_long + len(rest)
        if skip or size == 0 or (end is not None and offset >= end):
            return
        if size > limit:
            self._too_long(offset, size, head or rest)
        else:
            yield offset, rest

    def _too_long(self, offset: int, size: int, head: bytes) -> None:
        self._report(Fault(offset, size, "record too long", f"longer than {self._limit:,} bytes", head[:_HEAD]))
