"""Reading documents: JSON Lines, Parquet and plain text, .gz and .zst too, with errors that name file and line."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError
from megatron_moe.data.files import base_suffix, iterate_lines, open_stream, require_package

# Rows of Parquet in memory at a time.
_PARQUET_ROWS = 1024


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
        entry = json.loads(line.decode(_encoding(number)))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        if number == 1 and line.lstrip().startswith(b"["):
            raise UserError(f"{where}: a JSON array; tools/clean_wudao.py makes JSON Lines of it") from error
        raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:
        raise UserError(f"{where}: holds a number of more digits than can be read") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply; expected an object with {expected}") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected a JSON object with {expected}, got {type(entry).__name__}")
    return entry


def parse_document(line: bytes, json_key: str, path: Path, number: int, flag: str = "--json-key") -> str:
    """The text of one JSON line.

    Args:
        line: the line, with or without its newline.
        json_key: which field holds the text.
        path, number: the file and the line's number (from 1), for errors.
        flag: which one names the field, for errors.

    Raises:
        UserError: not UTF-8, not a JSON object, no such field, not a string, or text that Unicode does not
            allow.
    """
    where = f"{path} line {number}"
    entry = parse_object(line, f"the field {json_key!r}", path, number)
    if json_key not in entry:
        fields = ", ".join(sorted(map(repr, entry))) or "none"
        raise UserError(f"{where}: no field {json_key!r} ({flag}); fields here: {fields}")
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
    """Every document of a file, in order.

    Args:
        path: Parquet (.parquet), plain text with a document a line (.txt), otherwise JSON Lines; the last two
            may end with .gz or .zst.
        json_key: the field or column with the text; plain text has none.

    Raises:
        UserError: see `parse_document` and `iterate_lines`; or Parquet that is damaged or lacks the column.
    """
    suffix = base_suffix(path)
    if suffix == ".parquet":
        for row, text in enumerate(_parquet_column(path, json_key)):
            yield check_text(text, json_key, f"{path} row {row}")
        return
    with open_stream(path) as (stream, _):
        for number, line in enumerate(iterate_lines(stream, path), start=1):
            yield plain_line(line, path, number) if suffix == ".txt" else parse_document(line, json_key, path, number)


def plain_line(line: bytes, path: Path, number: int) -> str:
    """The text of one line of a plain text file, with its newline.

    Raises:
        UserError: not UTF-8.
    """
    try:
        return line.decode(_encoding(number))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _encoding(number: int) -> str:
    """UTF-8; a byte order mark, with which some programs begin a file, is no part of its text."""
    return "utf-8-sig" if number == 1 else "utf-8"


def _parquet_column(path: Path, column: str) -> Iterator[Any]:
    require_package("pyarrow", path)
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                columns = ", ".join(map(repr, file.schema_arrow.names))
                raise UserError(f"{path}: no column {column!r} (--json-key); columns here: {columns}")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not Parquet, or damaged: {str(error).splitlines()[0]}") from error
