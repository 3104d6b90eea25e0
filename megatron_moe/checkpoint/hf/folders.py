"""The folder that a conversion writes: what must hold of it before."""

from pathlib import Path

from megatron_moe.checkpoint.convert.journal import check_room, unfinished_folder
from megatron_moe.config.base import UserError


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


def check_room_early(target: Path, needed: int, flag: str) -> None:
    """`convert` looks for room before it writes; here before anything else is done. What an earlier start has written
    it alone can count.

    Raises:
        UserError: there is none.
    """
    if not unfinished_folder(target).exists():
        check_room(target, needed, flag)
