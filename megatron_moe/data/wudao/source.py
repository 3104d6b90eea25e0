"""What kind of file an input is, told by its first bytes, and its bytes as a stream that survives damage."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_moe.config.base import UserError
from megatron_moe.data.files import DAMAGED, base_suffix, open_stream

# objects: JSON objects one after the other, in an array, in {"RECORDS": [...]}, or with nothing around them.
Form = Literal["objects", "lines", "parquet", "empty"]

_MAGIC = ((b"\x1f\x8b", ".gz"), (b"\x28\xb5\x2f\xfd", ".zst"))
_PARQUET = b"PAR1"
_BOM = b"\xef\xbb\xbf"
_HEAD = 1 << 16
# An array, or the wrapper that a database's export puts around it, up to the first record.
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*+(?:\{\s*+\"RECORDS\"\s*+:\s*+)?\[")


@dataclass(frozen=True)
class Source:
    """An input file and how to read it.

    Attributes:
        path: the file.
        form: see `Form`.
        compression: `.gz`, `.zst`, or nothing.
        body: where the first record can stand, in uncompressed bytes: behind a byte order mark, `[` or `{"RECORDS": [`.
        array: an array or wrapper was opened, so the file must also close it.
    """

    path: Path
    form: Form
    compression: str
    body: int = 0
    array: bool = False


def inspect_source(path: Path) -> Source:
    """Tell a file's kind by its content; by its name only where the content cannot tell.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if magic == _PARQUET:
        return Source(path, "parquet", "")
    compression = next((name for start, name in _MAGIC if magic.startswith(start)), "")
    named = path.suffix.lower() if path.suffix.lower() in (".gz", ".zst") else ""
    # Plain JSON under a name that says compressed (a download that was unpacked on the way) is read as it is.
    if not compression and magic.removeprefix(_BOM).lstrip()[:1] not in (b"{", b"["):
        compression = named
    if base_suffix(path) == ".parquet" and not compression:
        return Source(path, "parquet", "")
    head = _read_head(path, compression)
    if not head.removeprefix(_BOM).strip():
        # Also where nothing can be decompressed: reading as lines says why.
        return Source(path, "empty" if path.stat().st_size == 0 or not compression else "lines", compression)
    if opening := _ARRAY.match(head):
        return Source(path, "objects", compression, body=opening.end(), array=True)
    body = len(_BOM) if head.startswith(_BOM) else 0
    form: Form = "lines" if base_suffix(path) == ".jsonl" or _is_lines(head[body:]) else "objects"
    return Source(path, form, compression, body=body)


def _read_head(path: Path, compression: str) -> bytes:
    head = b""
    with open_stream(path, compression) as (stream, _):
        try:
            while len(head) < _HEAD and (piece := stream.read1(_HEAD - len(head))):  # type: ignore[attr-defined]
                head += piece
        except DAMAGED:
            # Whoever reads on comes to the same place and reports it.
            return head
    return head


def _is_lines(head: bytes) -> bool:
    """Whether records stand one a line: the first line that is not empty opens an object and closes it."""
    line = head.lstrip().split(b"\n", 1)
    first = line[0].rstrip()
    whole = len(line) == 2 or len(head) < _HEAD
    return first.startswith(b"{") and (first.endswith(b"}") if whole else True)


@contextmanager
def open_bytes(
    source: Source, start: int, damaged: Callable[[str, int], None]
) -> Iterator[tuple[Callable[[int], bytes], Callable[[], int]]]:
    """Open a file at an offset.

    Yields:
        A function that reads so many of its (uncompressed) bytes, fewer at its end; and one that says how many bytes
        were read from the disk.

    Args:
        source: what to read; not Parquet.
        start: uncompressed offset of the first byte; only an uncompressed file is not read up to there.
        damaged: told why and at which (uncompressed) byte, when the file ends because its compressed data are cut or
            damaged.
    """
    with open_stream(source.path, source.compression) as (stream, disk_bytes):
        ended = False
        place = 0 if source.compression else start

        def read(size: int) -> bytes:
            nonlocal ended, place
            pieces: list[bytes] = []
            while size > 0 and not ended:
                try:
                    # read1 gives what stands before the damage; read would lose it.
                    piece = stream.read1(size) if source.compression else stream.read(size)  # type: ignore[attr-defined]
                except DAMAGED as error:
                    damaged(str(error) or type(error).__name__, place)
                    ended = True
                    break
                if not piece:
                    ended = True
                pieces.append(piece)
                place += len(piece)
                size -= len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

        if source.compression:
            while start > 0 and (skipped := read(min(start, _HEAD))):
                start -= len(skipped)
        else:
            stream.seek(start)
        yield read, disk_bytes
