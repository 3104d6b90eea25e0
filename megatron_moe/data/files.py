"""The files that data tools read and write: inputs found in folders, .gz and .zst read as streams, atomic writing.

No other module opens a compressed file; whatever others see appears under its name only when it is complete.
"""

import contextlib
import fcntl
import importlib
import io
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from megatron_moe.config.base import UserError, disk_error

DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
# What tools write beside data: a folder of theirs can be the input of the next tool as it is.
TOOL_FILES = frozenset({"report.json", "timings.json", "sample.json", "quarantine.jsonl"}) | {
    # A tokenizer's folder.
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "megatron_moe_tokenizer.json"),
}
_TOOL_ENDINGS = (".report.json", ".domains.json")
# Compressed bytes decompressed at a time. A 4-byte block of zstd can stand for 128 KiB, so this also bounds memory:
# 64 MiB.
_FEED = 2048
# zlib's code for "gzip members, with their checksums".
_GZIP = 16 + zlib.MAX_WBITS
_BUFFER = 1 << 20


def base_suffix(path: Path) -> str:
    """The ending that says what a file holds: `.jsonl` of `part.jsonl.zst`, in small letters."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return name.suffix.lower()


def expand_inputs(paths: Sequence[Path], flag: str = "--input", allow_empty: bool = False) -> list[Path]:
    """The data files that files and folders stand for.

    Args:
        paths: files, taken as they are and in this order; folders, replaced by the data files below them in the
            order of their paths. In folders, hidden files and reports of our own tools are left out.
        flag: where the paths came from, for errors.
        allow_empty: take files without a byte too, for who reports them elsewhere.

    Raises:
        UserError: a path is missing, a file is empty, a folder holds no data file, a file is named twice, or Parquet is
            compressed once more.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(_data_files(path))
            if not inside:
                endings = " ".join(DATA_SUFFIXES)
                raise UserError(f"{flag} {path}: no data file in this folder (one of {endings}, also .gz or .zst)")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"{flag} {path}: no such file or folder")
    packed = next((path for path in found if base_suffix(path) == ".parquet" != path.suffix.lower()), None)
    if packed is not None:
        raise UserError(
            f"{flag} {packed}: Parquet cannot be read out of {packed.suffix}; unpack it (it is packed inside)"
        )
    seen: set[Path] = set()
    for path in found:
        if path.stat().st_size == 0 and not allow_empty:
            raise UserError(f"{flag} {path}: the file is empty")
        if path.resolve() in seen:
            raise UserError(f"{flag} {path}: is given twice")
        seen.add(path.resolve())
    return found


def _data_files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        plain_name = path.name.removesuffix(".gz").removesuffix(".zst")
        own = plain_name in TOOL_FILES or plain_name.endswith(_TOOL_ENDINGS)
        if not hidden and not own and base_suffix(path) in DATA_SUFFIXES and path.is_file():
            yield path


@contextmanager
def open_stream(path: Path, compression: str | None = None) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Open a plain, gzip- or zstd-compressed file for reading.

    Args:
        path: the file.
        compression: `.gz`, `.zst` or an empty string; by default what the file's name ends with.

    Yields:
        The stream of its (uncompressed) bytes, and a function that says how many bytes of the file on disk
        were read so far, which is what a progress bar can compare with the file's size. Reading a damaged or
        cut compressed file raises EOFError, OSError or zlib.error, see `DAMAGED`; `read1` gives all that stands
        before the damage.

    Raises:
        UserError: the file cannot be opened, or zstandard is needed and missing.
    """
    try:
        raw = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    with raw:
        suffix = path.suffix.lower() if compression is None else compression
        if suffix == ".gz":
            yield io.BufferedReader(_FrameReader(raw, lambda: zlib.decompressobj(_GZIP), zlib.error), _BUFFER), raw.tell
        elif suffix == ".zst":
            zstandard = require_package("zstandard", path)
            new_frame = zstandard.ZstdDecompressor().decompressobj
            yield io.BufferedReader(_FrameReader(raw, new_frame, zstandard.ZstdError), _BUFFER), raw.tell
        else:
            yield raw, raw.tell


# What reading a stream of `open_stream` can raise when the file is damaged or cut short.
DAMAGED = (EOFError, OSError, zlib.error)


class _FrameReader(io.RawIOBase):
    """The decompressed bytes of gzip members or zstd frames, up to the very byte where they are damaged or cut.

    Python's own readers lose up to a buffer before the damage, and zstandard's hides that a file was cut. A skippable
    or empty frame gives nothing; what follows the last one must be another, or zeros (tapes pad with them).
    """

    def __init__(self, raw: IO[bytes], new_frame: Callable[[], Any], error: type[Exception]) -> None:
        self._raw = raw
        self._error = error
        self._new_frame = new_frame
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        """True: it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes at hand; 0 at the end of the file."""
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_FEED)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the compressed data end in the middle of a frame")
                return 0
            self._decompress()
        count = min(len(self._output), len(buffer))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self) -> None:
        if self._frame is None:
            self._input = self._input.lstrip(b"\0")
            if not self._input:
                return
            self._frame = self._new_frame()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._error as error:
            raise OSError(f"damaged compressed data ({error})") from error
        self._input = b""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None


def require_package(name: str, wanted_by: object) -> Any:
    """Import a package of the `data` extra.

    Raises:
        UserError: it is not installed; `wanted_by` names the file or flag that needs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{wanted_by}: needs the package {name}; pip install 'megatron_moe[data]'") from error


def iterate_lines(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of an opened file.

    Raises:
        UserError: the compressed data are damaged or cut short.
    """
    try:
        yield from stream
    except DAMAGED as error:
        raise UserError(f"{path}: cannot read it to the end: {error}") from error


@contextmanager
def locked_file(path: Path, busy: str, where: str) -> Iterator[None]:
    """Hold a file (made here) for this process alone; the hold ends with the process, however it ends.

    Raises:
        UserError: `busy`, where another process holds it; or it cannot be made, in the place `where`.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("wb")
    except OSError as error:
        raise disk_error(where, error) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(busy) from error
        except OSError:
            # Some cluster file systems have no locks; there it is up to the user to start one run at a time.
            pass
        yield


@contextmanager
def atomic_file(path: Path, where: str | None = None) -> Iterator[BinaryIO]:
    """A file to write that gets its name only when it is complete and on the disk; missing folders are made.

    Leaving by an exception removes what was written and leaves an earlier file of that name as it was.

    Args:
        path: the final name.
        where: how errors name it, such as `--output DIR`; the path by default.

    Raises:
        UserError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = temporary.open("wb")
    except OSError as error:
        raise disk_error(where or str(path), error) from error
    try:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        temporary.replace(path)
    except OSError as error:
        raise disk_error(where or str(path), error) from error
    finally:
        # Closing tries once more what a failed write has left in the buffer.
        with contextlib.suppress(OSError):
            stream.close()
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes, where: str | None = None) -> None:
    """Write a whole file under its name at once, see `atomic_file`; text as UTF-8."""
    with atomic_file(path, where) as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)
