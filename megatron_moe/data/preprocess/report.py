"""PREFIX.report.json, which says beside the pairs what they were made of."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


def report_path(prefix: Path) -> Path:
    """Where the report of a run's prefix stands."""
    return Path(f"{prefix}.report.json")


def find_report(prefix: Path) -> Path | None:
    """The report that names a pair, a shard or the pair of one field among several; None if there is none."""
    for base in _bases(prefix):
        path = report_path(base)
        if path.is_file() and prefix.name in [Path(output["prefix"]).name for output in read_report(path)["outputs"]]:
            return path
    return None


def read_report(path: Path) -> dict[str, Any]:
    """A report; `options` and `outputs` stand in it.

    Raises:
        UserError: it is none.
    """
    try:
        report = json.loads(path.read_bytes())
        if all(isinstance(output["prefix"], str) for output in report["outputs"]) and "options" in report:
            return report
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: is no report of tools/preprocess_data.py; delete it to do without")


def _bases(prefix: Path) -> Iterator[Path]:
    """The prefixes of runs that a pair can belong to: itself, without its shard, without its field."""
    name = _SHARD.sub("", prefix.name)
    yield prefix
    yield prefix.with_name(name)
    while "_" in name.lstrip("_"):
        name = name.rpartition("_")[0]
        if name:
            yield prefix.with_name(name)
