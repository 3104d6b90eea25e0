"""Whole lines of a byte range: those that begin inside it, wherever they end."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO

from megatron_moe.config.base import UserError
from megatron_moe.data.files import DAMAGED

# Bytes read, and lines handed on, at a time: enough for a tokenizer to work in batches.
_BLOCK = 1 << 20


class LineReader:
    """Reads a stream forward, range after range.

    Attributes:
        position: where in the stream the next line begins.
        line: its number, counted from where the reader began (1).
        ended: the stream's end was seen.

    Args:
        stream: from its current position on.
        path: its file, for errors.
        max_line_bytes: a longer line is an error: it would have to be held in memory.
        position: where the stream stands.
    """

    def __init__(self, stream: IO[bytes], path: Path, max_line_bytes: int, position: int = 0) -> None:
        self._stream = stream
        self._path = path
        self._max_line_bytes = max_line_bytes
        self._buffer = b""
        self.position = position
        self.line = 1
        self.ended = False

    def begins_with(self, start: bytes) -> bool:
        """Whether what comes next, spaces aside, begins like this."""
        if not self._buffer:
            self._fill()
        return self._buffer.lstrip().startswith(start)

    def skip_to(self, start: int) -> None:
        """Go on to the first line that begins at `start` or later."""
        if self.position >= start:
            return
        # A line begins at `start` where the byte before it is a newline.
        while self.position + len(self._buffer) < start:
            self._drop(len(self._buffer))
            if not self._fill():
                return
        self._drop(start - 1 - self.position)
        while (end := self._buffer.find(b"\n")) < 0:
            self._drop(len(self._buffer))
            if not self._fill():
                return
        self._drop(end + 1)

    def batches(self, stop: int) -> Iterator[tuple[int, list[bytes]]]:
        """The lines that begin before `stop`, without their newlines, with the number of the first."""
        while self.position < stop:
            room = stop - self.position
            # The last of them is the one over byte stop - 1.
            end = self._buffer.find(b"\n", room - 1) + 1 if len(self._buffer) >= room else 0
            end = end or self._buffer.rfind(b"\n", 0, room) + 1
            if end == 0:
                if len(self._buffer) > self._max_line_bytes:
                    raise UserError(
                        f"{self._path}: the line at byte {self.position:,} is over {self._max_line_bytes:,} bytes; "
                        "divide the document, or raise --max-document-bytes"
                    )
                if self._fill():
                    continue
                if not self._buffer:
                    return
                end = len(self._buffer)
            text = self._buffer[:end]
            lines = text.split(b"\n")
            if not lines[-1]:
                lines.pop()
            first = self.line
            self._buffer = self._buffer[end:]
            self.position += end
            self.line += len(lines)
            yield first, lines

    def _fill(self) -> bool:
        try:
            block = self._stream.read(_BLOCK)
        except DAMAGED as error:
            raise UserError(f"{self._path}: cannot read it to the end: {error}") from error
        self._buffer += block
        self.ended = not block
        return bool(block)

    def _drop(self, count: int) -> None:
        self.line += self._buffer.count(b"\n", 0, count)
        self._buffer = self._buffer[count:]
        self.position += count


def count_lines(stream: IO[bytes], stop: int) -> int:
    """Newlines in the first `stop` bytes of a stream."""
    count = 0
    while stop > 0 and (block := stream.read(min(stop, _BLOCK))):
        count += block.count(b"\n")
        stop -= len(block)
    return count
