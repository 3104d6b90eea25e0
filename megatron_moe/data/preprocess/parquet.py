"""Parquet, a few row groups and rows at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError
from megatron_moe.data.files import require_package

# Rows, and bytes of a column, in memory at a time.
_ROWS = 512
_BUFFER = 1 << 20


def row_group_bytes(path: Path) -> list[int]:
    """[row groups] unpacked bytes of each."""
    with _opened(path) as file:
        return [file.metadata.row_group(index).total_byte_size for index in range(file.num_row_groups)]


def row_count(path: Path) -> int:
    """Rows of the file."""
    with _opened(path) as file:
        return file.metadata.num_rows


def read_rows(path: Path, columns: Sequence[str], start: int, stop: int) -> Iterator[tuple[int, list[list[Any]]]]:
    """Rows of some row groups, a few at a time: the number of the first row (from 0) and the values of each column.

    Raises:
        UserError: the file is damaged or lacks a column.
    """
    with _opened(path) as file:
        names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                known = ", ".join(map(repr, names))
                raise UserError(f"{path}: no column {column!r} (--json-keys); columns here: {known}")
        row = sum(file.metadata.row_group(index).num_rows for index in range(start))
        groups = list(range(start, stop))
        for batch in file.iter_batches(_ROWS, row_groups=groups, columns=list(columns), use_threads=False):
            yield row, [batch.column(name).to_pylist() for name in columns]
            row += batch.num_rows


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    require_package("pyarrow", path)
    import pyarrow
    from pyarrow import parquet

    try:
        # Without the buffer a whole column of a row group would be read at once.
        with parquet.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not Parquet, or damaged: {str(error).splitlines()[0]}") from error
