"""The folder that a conversion writes: what must hold of it before."""

import shutil
from pathlib import Path

from megatron_moe.checkpoint.convert.journal import unfinished_folder
from megatron_moe.config.base import UserError

# Tokenizer, card, configs, journal.
_SMALL_FILES = 64 << 20


def check_target(target: Path, flag: str, source: Path, source_flag: str) -> None:
    """A folder to write must be new or empty, and neither lie in the source nor hold it.

    Raises:
        UserError: it does not.
    """
    if not target.name:
        raise UserError(
            f"{flag} {target}: has no name that a folder could be given; give a folder that is not there yet"
        )
    if target.exists() and not target.is_dir():
        raise UserError(f"{flag} {target}: is a file; give a folder that is not there yet")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{flag} {target}: is not empty; give a folder that is not there yet")
    resolved, origin = target.resolve(), source.resolve()
    if resolved == origin or origin in resolved.parents or resolved in origin.parents:
        raise UserError(f"{flag} {target}: lies in {source_flag} {source}, or around it; give a folder beside it")


def check_room(target: Path, needed: int, flag: str) -> None:
    """There must be room for what will be written; what an earlier start has written is counted by `convert`.

    Raises:
        UserError: there is not.
    """
    if unfinished_folder(target).exists():
        return
    place = target.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + _SMALL_FILES:
        raise UserError(
            f"{flag} {target}: needs {_gigabytes(needed + _SMALL_FILES)}, but {place} has {_gigabytes(free)} free; "
            "make room, or give another place"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
