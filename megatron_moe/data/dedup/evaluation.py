"""The texts of evaluation sets: every string, or named fields, of records in JSON, JSON Lines, CSV, Parquet or text."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError
from megatron_moe.data.files import base_suffix, iterate_lines, open_stream, require_package

SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet")


def evaluation_texts(path: Path, fields: Sequence[str]) -> Iterator[str]:
    """The texts of one file.

    Args:
        path: the file; .gz and .zst are unpacked.
        fields: the fields of a record that hold texts, at any depth; every string when empty. In a text file each
            line is a text whatever the fields.

    Raises:
        UserError: it cannot be read, holds no such field, or is no file of evaluation texts.
    """
    suffix = base_suffix(path)
    if suffix == ".txt":
        yield from (line.strip() for line in _decoded(path).splitlines())
        return
    found = False
    for record in _records(path, suffix):
        for text in _strings(record, fields, inside=not fields):
            found = True
            yield text
    if not found:
        wanted = f"no field {' or '.join(fields)} with text" if fields else "no text"
        raise UserError(f"{path}: holds {wanted}")


def _records(path: Path, suffix: str) -> Iterator[Any]:
    if suffix == ".parquet":
        parquet = require_package("pyarrow.parquet", path)
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: is no readable Parquet file: {str(error).splitlines()[0]}") from error
    elif suffix in (".csv", ".tsv"):
        yield from csv.DictReader(io.StringIO(_decoded(path), newline=""), delimiter="\t" if suffix == ".tsv" else ",")
    elif suffix in (".json", ".jsonl"):
        yield from _json_records(path, _decoded(path))
    else:
        raise UserError(f"{path}: is not a kind of evaluation file known here: {' '.join(SUFFIXES)}, also .gz or .zst")


def _decoded(path: Path) -> str:
    with open_stream(path) as (stream, _):
        data = b"".join(iterate_lines(stream, path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8; convert the file") from error


def _json_records(path: Path, text: str) -> Iterator[Any]:
    """One JSON value over the whole file, or one a line."""
    try:
        yield json.loads(text)
        return
    except ValueError:
        pass
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is no JSON: {error}") from error


def _strings(value: Any, fields: Sequence[str], inside: bool) -> Iterator[str]:
    """The strings in a record: all of them when `inside` a chosen field, else those below a chosen field."""
    if isinstance(value, str):
        if inside:
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(item, fields, inside or key in fields)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, fields, inside)
