"""Reading documents: JSON Lines (one object a line, .gz too) with errors that name file and line."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from megatron_moe.config.base import UserError


def check_input_files(paths: Sequence[Path]) -> None:
    """Every path must be a file with something in it.

    Raises:
        UserError: naming the first path that is missing, a folder or empty.
    """
    for path in paths:
        if not path.is_file():
            raise UserError(f"--input {path}: no such file; give JSON Lines files (.jsonl or .jsonl.gz)")
        if path.stat().st_size == 0:
            raise UserError(f"--input {path}: the file is empty")


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open a plain or gzip-compressed file.

    Yields:
        The stream of its (uncompressed) lines, and a function that says how many bytes of the file on disk
        were read so far, which is what a progress bar can compare with the file's size.
    """
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as packed:
                yield io.BufferedReader(packed, 1 << 20), raw.tell
        else:
            yield raw, raw.tell


def iterate_lines(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of an opened file.

    Raises:
        UserError: the compressed data are damaged or cut short.
    """
    try:
        yield from stream
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path}: cannot read it to the end: {error}") from error


def parse_object(line: bytes, expected: str, path: Path, number: int) -> dict[str, Any]:
    """The JSON object of one line.

    Args:
        line: the line, with or without its newline.
        expected: what the object should hold, for errors: `the field 'text'`.
        path, number: the file and the line's number (from 1), for errors.

    Raises:
        UserError: not UTF-8, or not a JSON object.
    """
    where = f"{path} line {number}"
    if not line.strip():
        raise UserError(f"{where}: empty line; every line must be a JSON object")
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:
        raise UserError(f"{where}: holds a number of more digits than can be read") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply; expected an object with {expected}") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a JSON object with {expected}, got {type(entry).__name__}")
    return entry


def parse_document(line: bytes, json_key: str, path: Path, number: int) -> str:
    """The text of one JSON line.

    Args:
        line: the line, with or without its newline.
        json_key: which field holds the text.
        path, number: the file and the line's number (from 1), for errors.

    Raises:
        UserError: not UTF-8, not a JSON object, no such field, not a string, or text that Unicode does not
            allow.
    """
    where = f"{path} line {number}"
    entry = parse_object(line, f"the field {json_key!r}", path, number)
    if json_key not in entry:
        fields = ", ".join(sorted(map(repr, entry))) or "none"
        raise UserError(f"{where}: no field {json_key!r} (--json-key); fields here: {fields}")
    return check_text(entry[json_key], json_key, where)


def check_text(text: Any, json_key: str, where: str) -> str:
    """A field's value as text.

    Raises:
        UserError: not a string, or one that Unicode does not allow; `where` begins the message.
    """
    if not isinstance(text, str):
        raise UserError(f"{where}: field {json_key!r} must be a string, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half of a surrogate pair at character {error.start}; clean the text") from error
    return text


def read_documents(path: Path, json_key: str) -> Iterator[str]:
    """Every document of a JSON Lines file, in order.

    Raises:
        UserError: see `parse_document` and `iterate_lines`.
    """
    with open_lines(path) as (stream, _):
        for number, line in enumerate(iterate_lines(stream, path), start=1):
            yield parse_document(line, json_key, path, number)
