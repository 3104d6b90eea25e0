"""Reads the descriptions that lie beside weights, config.json or an index; of another program they may be anything."""

from pathlib import Path

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
