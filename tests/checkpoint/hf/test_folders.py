"""What must hold of the folder that a conversion writes, before it begins."""

from pathlib import Path

import pytest

from megatron_moe.checkpoint.convert.journal import unfinished_folder
from megatron_moe.checkpoint.hf import folders
from megatron_moe.config.base import UserError


def test_what_lies_there_already_needs_no_room(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output .*out: needs 1,000,000,000\.07 GB, but .* GB free; make room"):
        folders.check_room_early(tmp_path / "out", 10**18, "--output")
    unfinished_folder(tmp_path / "out").mkdir()
    folders.check_room_early(tmp_path / "out", 10**18, "--output")
