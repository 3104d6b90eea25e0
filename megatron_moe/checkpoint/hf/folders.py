"""The folder that a conversion writes: what must hold of it before, and that it is complete or not there."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_moe.checkpoint.convert.blocks import Block
from megatron_moe.checkpoint.convert.journal import unfinished_folder
from megatron_moe.checkpoint.convert.stream import TensorWriter, convert
from megatron_moe.checkpoint.convert.tensors import TensorSource
from megatron_moe.config.base import UserError, disk_error

# Tokenizer, card, configs, journal.
_SMALL_FILES = 64 << 20
# What is advised when the disk is full (`base.py:disk_error`), a process died (`stream.py`, `verify.py`), or another
# one works on the same folder (`journal.py`).
_GO_ON = ("then start again", "start the same again", "wait for it to end")


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


def convert_whole(
    blocks: Sequence[Block],
    source: TensorSource,
    writer: TensorWriter,
    output: Path,
    *,
    inputs: Sequence[Path],
    finish: Callable[[Path], None],
    flag: str,
    workers: int | None,
) -> None:
    """`stream.py:convert`, which keeps what it has written for another start; here what no other start can finish is
    removed, as when the source is damaged or the proof failed.

    Raises:
        UserError: see there, or raised by `finish`.
    """
    folder = unfinished_folder(output)
    # Of an earlier start, whose work is not thrown away for a mistake in this one.
    found, finishing = folder.exists(), False

    def finish_noted(place: Path) -> None:
        nonlocal finishing
        finishing = True
        try:
            finish(place)
        except OSError as error:
            raise disk_error(f"{flag} {output}", error) from error

    try:
        convert(blocks, source, writer, output, inputs=inputs, finish=finish_noted, flag=flag, workers=workers)
    except UserError as error:
        goes_on = any(words in str(error) for words in _GO_ON)
        if not goes_on and (finishing or not found):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
