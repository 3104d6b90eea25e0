"""What is left of a conversion that cannot be finished: nothing, unless another start goes on with it."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint.convert.journal import unfinished_folder
from megatron_moe.checkpoint.hf import folders
from megatron_moe.config.base import DISK_FULL, UserError, disk_error


def fail_with(error: Exception, *, when_finishing: bool = False) -> Callable[..., None]:
    """Stands for `convert`: makes the folder, and fails."""

    def convert(*arguments: Any, finish: Callable[[Path], None], **options: Any) -> None:
        unfinished_folder(arguments[3]).mkdir(exist_ok=True)
        if when_finishing:
            finish(unfinished_folder(arguments[3]))
        raise error

    return convert


def refuse(_: Path) -> None:
    raise UserError("logits differ")


def full(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


FULL = disk_error("--output", OSError(DISK_FULL[0], "No space left on device"))
DEAD = UserError("a process died; start the same again to go on, with fewer --workers if memory was short")
BUSY = UserError("--output x: another process is converting into it; wait for it to end")


@pytest.mark.parametrize(
    ("stub", "finish", "found", "kept"),
    [
        (fail_with(UserError("damaged")), refuse, False, False),
        (fail_with(UserError("damaged")), refuse, True, True),
        (fail_with(FULL), refuse, False, True),
        (fail_with(DEAD), refuse, False, True),
        (fail_with(BUSY), refuse, False, True),
        (fail_with(UserError("never"), when_finishing=True), refuse, False, False),
        (fail_with(UserError("never"), when_finishing=True), refuse, True, False),
        (fail_with(UserError("never"), when_finishing=True), full, False, True),
        (fail_with(KeyboardInterrupt()), refuse, False, True),  # type: ignore[arg-type]
    ],
    ids=["damage", "damage, resumed", "full", "dead", "busy", "proof", "proof, resumed", "full at the end", "stopped"],
)
def test_what_is_left(
    stub: Any, finish: Any, found: bool, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "convert", stub)
    output = tmp_path / "out"
    if found:
        unfinished_folder(output).mkdir()
    nothing: Any = None
    with pytest.raises((UserError, KeyboardInterrupt)):
        folders.convert_whole([], nothing, nothing, output, inputs=[], finish=finish, flag="--output", workers=1)
    assert unfinished_folder(output).exists() == kept


def test_what_lies_there_already_needs_no_room(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output .*out: needs 1,000,000,000\.07 GB, but .* GB free; make room"):
        folders.check_room(tmp_path / "out", 10**18, "--output")
    unfinished_folder(tmp_path / "out").mkdir()
    folders.check_room(tmp_path / "out", 10**18, "--output")
