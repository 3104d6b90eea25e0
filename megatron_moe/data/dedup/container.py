"""The files of deduplication: one line that says what they are, little-endian arrays, an end mark with a count.

A file is written under a temporary name and gets its own when complete. A cut, damaged or foreign file, or one of
another version, is a one-line error, never a wrong result.
"""

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_moe.config.base import UserError
from megatron_moe.data.files import atomic_file

VERSION = 1
_END = struct.Struct("<8sQQ")
_END_MARK = b"DEDUPEND"
_LONGEST_HEADER = 1 << 20


def write_header(stream: BinaryIO, kind: str, fields: dict[str, Any]) -> bytes:
    """Write the first line, JSON and a checksum of it, padded to whole 8 bytes, and return it."""
    text = json.dumps({"megatron_moe": kind, "version": VERSION, **fields}, sort_keys=True).encode()
    line = b"%s %016x" % (text, checksum(text))
    line += b" " * (-(len(line) + 1) % 8) + b"\n"
    stream.write(line)
    return line


def write_end(stream: BinaryIO, count: int, checksum: int) -> None:
    """Write the end mark."""
    stream.write(_END.pack(_END_MARK, count, checksum))


@contextmanager
def opened(path: Path, kind: str) -> Iterator[tuple[BinaryIO, dict[str, Any], int, int]]:
    """Open a file of this kind.

    Yields:
        The stream after the header; the header's fields, to which `line`, the header itself, and `body`, first byte
        and length of what follows, are added; the count and the checksum of the end mark.

    Raises:
        UserError: it cannot be read, is not of this kind and version, or was cut short.
    """
    try:
        with path.open("rb") as stream:
            line = stream.readline(_LONGEST_HEADER)
            fields = _header_fields(line, path, kind)
            begin = len(line)
            size = os.fstat(stream.fileno()).st_size
            if size < begin + _END.size:
                raise broken(path, kind)
            stream.seek(size - _END.size)
            mark, count, checksum = _END.unpack(stream.read(_END.size))
            if mark != _END_MARK:
                raise broken(path, kind)
            fields |= {"line": line, "body": (begin, size - _END.size - begin)}
            stream.seek(begin)
            yield stream, fields, count, checksum
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _header_fields(line: bytes, path: Path, kind: str) -> dict[str, Any]:
    text, _, expected = line.rstrip(b" \n").rpartition(b" ")
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or fields.get("megatron_moe") != kind:
        raise UserError(f"{path}: is not a {kind} file of deduplication; remove it and run the stage again")
    if fields.get("version") != VERSION:
        version = str(fields.get("version"))[:20]
        raise UserError(f"{path}: has version {version}, this program reads {VERSION}; run the stage again")
    if expected != b"%016x" % checksum(text):
        raise broken(path, kind)
    return fields


def broken(path: Path, kind: str) -> UserError:
    """The error for a file whose content does not hold together."""
    return UserError(f"{path}: this {kind} file is damaged or cut short; remove it and run the stage again")


def read_array(stream: BinaryIO, dtype: str, count: int, path: Path, kind: str) -> npt.NDArray[Any]:
    """The next `count` numbers."""
    data = stream.read(count * np.dtype(dtype).itemsize)
    if len(data) != count * np.dtype(dtype).itemsize:
        raise broken(path, kind)
    return np.frombuffer(data, dtype=dtype)


def checksum(data: npt.NDArray[Any] | bytes) -> int:
    """A 64-bit hash of bytes."""
    return int(xxhash.xxh3_64_intdigest(data if isinstance(data, bytes) else np.ascontiguousarray(data).data.cast("B")))


class TableWriter:
    """Writes a table of rows of one type piece by piece: pairs, or what is dropped."""

    def __init__(self, stream: BinaryIO, kind: str, fields: dict[str, Any]) -> None:
        self._stream = stream
        self._hash = xxhash.xxh3_64(write_header(stream, kind, fields))
        self.rows = 0

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Append rows of a (structured or two-dimensional) array."""
        data = np.ascontiguousarray(rows).tobytes()
        self._hash.update(data)
        self._stream.write(data)
        self.rows += len(rows)

    def finish(self) -> None:
        """Write the end mark."""
        write_end(self._stream, self.rows, self._hash.intdigest())


@contextmanager
def table_writer(path: Path, kind: str, fields: dict[str, Any]) -> Iterator[TableWriter]:
    """A table to write, which gets its name when it is complete."""
    with atomic_file(path) as stream:
        writer = TableWriter(stream, kind, fields)
        yield writer
        writer.finish()


def read_table(path: Path, kind: str, dtype: npt.DTypeLike, rows_at_once: int) -> Iterator[npt.NDArray[Any]]:
    """The rows of a table in pieces; the last piece is given only after the checksum was found right.

    Raises:
        UserError: see `opened`; or the content does not match its checksum.
    """
    item = np.dtype(dtype).itemsize
    with opened(path, kind) as (stream, fields, count, expected):
        digest = xxhash.xxh3_64(fields["line"])
        if count == 0 and digest.intdigest() != expected:
            raise broken(path, kind)
        if fields["body"][1] != count * item:
            raise broken(path, kind)
        for begin in range(0, count, rows_at_once):
            data = stream.read(min(rows_at_once, count - begin) * item)
            digest.update(data)
            if begin + rows_at_once >= count and digest.intdigest() != expected:
                raise broken(path, kind)
            yield np.frombuffer(data, dtype=dtype)


def read_fields(path: Path, kind: str) -> dict[str, Any]:
    """The header of a file."""
    with opened(path, kind) as (_, fields, count, _checksum):
        return {**fields, "count": count}
