"""Reads the rows of metrics.jsonl and expert_load.jsonl, with errors that name file and line. No torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError
from megatron_moe.data.documents import parse_object

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a run's file, all at once; see `iterate_rows`."""
    return [row for _, row in iterate_rows(path)]


def iterate_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Line numbers (from 1) and rows of a run's file, one at a time.

    A last line without its newline is still being written and is left out.

    Raises:
        UserError: there is no such file, or a line is no row.
    """
    try:
        with path.open("rb") as stream:
            for line_number, line in enumerate(stream, start=1):
                if line.endswith(b"\n"):
                    yield line_number, parse_row(line[:-1], path, line_number)
    except FileNotFoundError as error:
        raise UserError(f"--run {path.parent}: holds no {path.name}; give the --save folder of a run") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def parse_row(line: bytes, path: Path, number: int) -> Row:
    """One row: an object that says which step it is of.

    Raises:
        UserError: it is something else; `path` and `number` name the line.
    """
    row = parse_object(line, "the field 'step'", path, number)
    step = row.get("step")
    if type(step) is not int or not 0 <= step < 2**53:
        raise UserError(f"{path} line {number}: expected the number of a step in 'step', got {str(step)[:40]!r}")
    return row


def number(value: Any, name: str, where: str | Path) -> float:
    """A value of a row as a number; NaN is one.

    Raises:
        UserError: it is something else, or too large for a float.
    """
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    except OverflowError:
        pass
    raise UserError(f"{where}: {name} is {str(value)[:40]!r}, expected a number")


def counts(row: Row, where: str) -> tuple[int, list[float]]:
    """Layer and tokens per expert of a row of expert_load.jsonl; `where` names it in errors.

    Raises:
        UserError: it lacks them, or they are no numbers.
    """
    layer, tokens = row.get("layer"), row.get("tokens")
    if type(layer) is not int or not 0 <= layer < 2**31 or not isinstance(tokens, list) or not tokens:
        raise UserError(f"{where}: expected the fields 'step', 'layer' and 'tokens'")
    numbers = [number(count, "a count of 'tokens'", where) for count in tokens]
    if not all(0 <= count < 2**53 for count in numbers):
        raise UserError(f"{where}: 'tokens' holds what is no number of tokens")
    return layer, numbers


def amount(row: Row, name: str, where: str) -> float:
    """How many, in the field `name`; 0 where an older version of this package wrote none.

    Raises:
        UserError: it is no number of things.
    """
    value = row.get(name)
    found = 0.0 if value is None else number(value, name, where)
    if not 0 <= found < 2**53:
        raise UserError(f"{where}: {name} is {str(value)[:40]!r}, expected a number of assignments")
    return found
