"""Rows of Parquet as records: a damaged row group costs itself alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.data.files import require_package
from megatron_moe.data.wudao.objects import Fault, Record, Report

# Rows decoded at a time; documents of 2,000 characters make 1 MB of these.
_ROWS = 256


def row_group_sizes(path: Path) -> list[int]:
    """Compressed bytes of every row group; none when the file is damaged (who reads it says so)."""
    require_package("pyarrow", path)
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            return [
                sum(group.column(column).total_compressed_size for column in range(group.num_columns))
                for group in groups
            ]
    except (pyarrow.ArrowException, OSError):
        return []


def row_records(
    path: Path, start: int, end: int | None, needed: str, wanted: Sequence[str], report: Report
) -> Iterator[Record]:
    """The rows of some row groups, each as (number in the file, 1, values by column).

    Args:
        path: a Parquet file.
        start, end: the first row group, and the one behind the last; None for the file's end.
        needed: the column that must exist: without it no row is a document.
        wanted: other columns to decode where they exist; columns nobody uses may hold far more than the text.
        report: told of row groups that cannot be read, and of texts that are not UTF-8.
    """
    require_package("pyarrow", path)
    import pyarrow
    from pyarrow import parquet

    damage = (pyarrow.ArrowException, OSError)
    try:
        # Without pre-buffering, pages are read as they are needed: a row group of any size fits in memory.
        file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except damage as error:
        report(Fault(0, 0, "damaged file", f"not Parquet, or damaged: {_line(error)}", b""))
        return
    with file:
        names = file.schema_arrow.names
        rows = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        if needed not in names:
            detail = f"no column {needed!r} (--text-key); columns: {', '.join(names)}"
            report(Fault(sum(rows[:start]), sum(rows[start:end]), "no text", detail, b""))
            return
        columns = [needed, *(name for name in dict.fromkeys(wanted) if name in names and name != needed)]
        for group in range(start, len(rows) if end is None else end):
            number, behind = sum(rows[:group]), sum(rows[: group + 1])
            try:
                for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=columns):
                    for values in _values(batch, number, report):
                        yield number, 1, values
                        number += 1
            except damage as error:
                detail = f"row group {group}: {_line(error)}"
                report(Fault(number, behind - number, "damaged file", detail, b""))


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _values(batch: Any, number: int, report: Report) -> list[dict[str, Any]]:
    try:
        return _mend_bytes(batch.to_pylist(), number, report)
    except UnicodeDecodeError:
        return _mend_bytes(_as_bytes(batch).to_pylist(), number, report)


def _as_bytes(batch: Any) -> Any:
    """The batch with its texts as bytes: what is not UTF-8 is found one by one."""
    import pyarrow

    kinds = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    columns = [column.cast(kinds[column.type]) if column.type in kinds else column for column in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _mend_bytes(rows: list[dict[str, Any]], number: int, report: Report) -> list[dict[str, Any]]:
    """Decode the bytes among the values (a column of bytes, or one whose texts are not all UTF-8)."""
    for place, row in enumerate(rows):
        for name, value in row.items():
            if type(value) is not bytes:
                continue
            text = value.decode("utf-8", "replace")
            if "�" in text and text.encode() != value:
                detail = f"{name!r}: bytes that are not UTF-8 became U+FFFD"
                report(Fault(number + place, 1, "mended", detail, value[:200], kept=True))
            row[name] = text
    return rows
