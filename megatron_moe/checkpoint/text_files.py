"""Reads the descriptions that lie beside weights, config.json or an index; of another program they may be anything."""

import json
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError

LARGEST_CONFIG = 10_000_000


def read_at_most(path: Path, most: int = LARGEST_CONFIG) -> bytes:
    """A file that has to be small.

    Raises:
        UserError: it cannot be read, or has more than `most` bytes.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if len(content) > most:
        raise UserError(f"{path}: is larger than {most:,} bytes, so it is not what its name says")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        UserError: it cannot be read, is too large, or holds something else.
    """
    try:
        content = json.loads(read_at_most(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, is not JSON ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged, holds a {type(content).__name__} and no object")
    return content
