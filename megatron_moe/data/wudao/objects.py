"""Find JSON objects one after the other in a stream of bytes, however damaged, without ever holding more than one.

WuDao's parts are JSON arrays of gigabytes. A regular expression finds where one object ends and the next begins, and
orjson parses what lies between. Only where that fails, because a string or a nested value looks like a boundary,
brackets are counted. What cannot be parsed at all is reported, and reading goes on at the next start of a record.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import orjson

# Bytes read at a time.
_CHUNK = 1 << 22
# Whitespace in a boundary is bounded, so that one that lies across two chunks is found again with this much overlap.
_BOUNDARY = re.compile(rb"\}\s{0,40}+,?+\s{0,40}+(?=\{\s{0,40}+\")")
_OVERLAP = 200
# Between records: commas and the brackets of arrays, also of several files joined by cat.
_BOM = b"\xef\xbb\xbf"
_BETWEEN = re.compile(rb"(?:[\s,\[\]]|\xef\xbb\xbf)*+")
# What may stand in an object between two brackets. A string must be followed as JSON has it: that shows at once when
# a missing quote has turned text inside out.
_PLAIN = re.compile(
    rb'(?:[\s,:]++|"[^"\\]*+(?:\\.[^"\\]*+)*+"(?=\s*+[,:}\]])|-?+[0-9][0-9.eE+-]*+|true|false|null|NaN|-?+Infinity)*+',
    re.DOTALL,
)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_WRAPPER_END = re.compile(rb"\}\s*+\Z")
_LONGEST_WORD = 64
_HEAD = 200


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that could not be read as it should be.

    Attributes:
        offset: where in the (uncompressed) bytes, or which row of Parquet.
        size: bytes, or rows, that it covers.
        reason: the kind, one of a few.
        detail: what exactly.
        head: its first bytes.
        kept: the record was kept, mended as `detail` says; otherwise it is lost.
    """

    offset: int
    size: int
    reason: str
    detail: str
    head: bytes
    kept: bool = False


Report = Callable[[Fault], None]
# Offset, size in bytes, value.
Record = tuple[int, int, Any]


def parse(raw: bytes | memoryview) -> tuple[Any, str]:
    """A JSON value, mended where a reader can: bytes that are not UTF-8, control characters and half surrogate pairs.

    Returns:
        The value, and what was mended (nothing, mostly).

    Raises:
        ValueError: it is not JSON, with the reason.
    """
    try:
        return orjson.loads(raw), ""
    except orjson.JSONDecodeError as error:
        strict = error
    text = bytes(raw).decode("utf-8", "replace")
    mended = "bytes that are not UTF-8 became U+FFFD" if "�" in text and not _is_utf8(raw) else ""
    try:
        value = json.loads(text, strict=False, parse_constant=lambda name: None)
        # Through UTF-16 and back: pairs of escapes that belong together join, lone ones become U+FFFD.
        whole = (
            json.dumps(value, ensure_ascii=False).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        )
        return orjson.loads(whole), mended or f"mended: {strict.msg}"
    except json.JSONDecodeError as error:
        # Without the position's line and column: they count from the start of the record.
        raise ValueError(f"{error.msg} (byte {len(text[: error.pos].encode())} of the record)") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _is_utf8(raw: bytes | memoryview) -> bool:
    try:
        bytes(raw).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


class _TooLongError(Exception):
    """A record is longer than the limit."""


class _Window:
    """The part of a stream that is looked at: `data` begins at offset `base`."""

    def __init__(self, read: Callable[[int], bytes], base: int) -> None:
        self._read = read
        self.base = base
        self.data = b""
        self.ended = False

    def extend(self, keep: int) -> int:
        """Forget what lies before `keep`, read more behind; return how far everything moved."""
        rest = self.data[keep:]
        # In proportion to what is held, so that a long record is not copied over and over.
        piece = self._read(max(_CHUNK, len(rest)))
        self.ended = not piece
        self.data = rest + piece
        self.base += keep
        return keep


class ObjectScanner:
    """Finds the objects of a stream.

    Args:
        read: gives the next bytes of the stream, none at its end.
        offset: where the stream begins in the file, for reports.
        report: told of every fault.
        fields: names that a record's first field can have: where one of them follows `{`, reading can go on.
        limit: bytes of the longest record.
    """

    def __init__(
        self, read: Callable[[int], bytes], offset: int, report: Report, fields: tuple[str, ...], limit: int
    ) -> None:
        self._window = _Window(read, offset)
        self._report = report
        self._limit = limit
        names = b"|".join(re.escape(name.encode()) for name in fields)
        self._resume = re.compile(rb"\{\s{0,40}+\"(?:" + names + rb")\"\s{0,40}+:")
        self._lost = ("", "")
        # Whether `]` stood behind the last object.
        self.closed = False

    def __iter__(self) -> Iterator[Record]:
        window, limit, loads, boundary = self._window, self._limit, orjson.loads, _BOUNDARY.search
        place = self._next_start(0)
        while place >= 0:
            base, searched = window.base, place + 1
            view = memoryview(window.data)
            # The fast path: as long as objects end where they seem to.
            while match := boundary(view, searched):
                end = match.start() + 1
                if end - place > limit:
                    break
                try:
                    value = loads(view[place:end])
                except orjson.JSONDecodeError:
                    break
                yield base + place, end - place, value
                place = match.end()
                searched = place + 1
            # What is seen of a record must not depend on where the window begins: ranges and whole files read alike.
            if match is None and not window.ended and len(view) - place <= limit + _OVERLAP:
                searched = max(place + 1, len(view) - _OVERLAP)
                del view
                place -= window.extend(place)
                continue
            seeming_size = match.start() + 1 - place if match else 0
            del view, match
            start = base + place
            found = self._one_slowly(start, seeming_size)
            if found:
                yield found
                place = self._next_start(start + found[1] - window.base)
            else:
                place = self._resync(start, start + 1)

    def _one_slowly(self, start: int, seeming_size: int) -> Record | None:
        """The object at an offset, which is not as it should be or not known to end; None where there is none."""
        try:
            if 0 < seeming_size <= self._limit:
                with contextlib.suppress(ValueError):
                    return self._mended(start, seeming_size)
            return self._mended(start, self._balanced_size(start))
        except _TooLongError:
            self._lost = ("record too long", f"longer than {self._limit:,} bytes")
        except ValueError as error:
            self._lost = ("not JSON", str(error))
        return None

    def _mended(self, start: int, size: int) -> Record:
        place = start - self._window.base
        raw = self._window.data[place : place + size]
        value, mended = parse(raw)
        if mended:
            self._report(Fault(start, size, "mended", mended, raw[:_HEAD], kept=True))
        return start, size, value

    def _balanced_size(self, start: int) -> int:
        """Bytes up to where the object's brackets close.

        Raises:
            _TooLongError: not within the limit.
            ValueError: they never do.
        """
        window = self._window
        position = start - window.base
        depth = 0
        while True:
            data, place = window.data, start - window.base
            position = _PLAIN.match(data, position).end()  # type: ignore[union-attr]
            if position - place >= self._limit:
                raise _TooLongError
            character = data[position : position + 1]
            if character in (b"{", b"["):
                depth += 1
            elif character in (b"}", b"]"):
                depth -= 1
                if depth == 0:
                    return position + 1 - place
            elif not _could_go_on(data, position):
                raise ValueError(f"not JSON from byte {position - place} of the record on")
            elif window.ended:
                raise ValueError("the data end in the middle of the record")
            elif len(data) - place > self._limit:
                raise _TooLongError
            else:
                position -= window.extend(place)
                continue
            position += 1

    def _next_start(self, place: int) -> int:
        """Where the next object begins in the window, from a place between objects; -1 at the end of the stream."""
        window = self._window
        self.closed = False
        while True:
            data = window.data
            position = _BETWEEN.match(data, place).end()  # type: ignore[union-attr]
            self.closed = self.closed or b"]" in data[place:position]
            if data[position : position + 1] == b"{":
                return position
            at_end = len(data) - position < len(_BOM) or (self.closed and _WRAPPER_END.match(data, position))
            if window.ended or not at_end:
                break
            place = position - window.extend(position)
        if at_end and (position == len(data) or data[position : position + 1] == b"}"):
            return -1
        self._lost = ("not a record", "expected { here")
        return self._resync(window.base + position, window.base + position)

    def _resync(self, start: int, search_from: int) -> int:
        """Report the bytes from an offset to the next start of a record as lost; return that start, -1 for none."""
        window = self._window
        head = window.data[start - window.base : start - window.base + _HEAD]
        while True:
            place = search_from - window.base
            resumed, bounded = self._resume.search(window.data, place), _BOUNDARY.search(window.data, place)
            starts = [resumed.start()] if resumed else []
            starts += [bounded.end()] if bounded else []
            if starts or window.ended:
                break
            search_from = max(search_from, window.base + len(window.data) - _OVERLAP)
            window.extend(search_from - window.base)
        end = window.base + (min(starts) if starts else len(window.data))
        self._report(Fault(start, end - start, *self._lost, head[: end - start]))
        # Whether an array was closed cannot be told behind this.
        self.closed = True
        return end - window.base if starts else -1


def _could_go_on(data: bytes, position: int) -> bool:
    """Whether JSON that stops being regular here could be regular with more bytes behind the end of `data`."""
    if len(data) - position < _LONGEST_WORD:
        return True
    if data[position : position + 1] != b'"':
        return False
    string = _STRING.match(data, position)
    return string is None or not data[string.end() : string.end() + _OVERLAP].strip()
