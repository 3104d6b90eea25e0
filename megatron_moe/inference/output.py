"""Result files: written under a temporary name and shown when they are whole. No torch here."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError
from megatron_moe.data.files import atomic_file


def check_output(output: str, *inputs: str) -> None:
    """Find out before the work whether its result can be written; makes missing folders.

    Args:
        output: value of --output.
        inputs: files that it must not replace.

    Raises:
        UserError: it cannot, or it is one of the inputs.
    """
    path = Path(output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: cannot make its folder: {error.strerror}") from error
    if path.is_dir():
        raise UserError(f"--output {output}: is a folder; give a file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output {output}: its folder is not writable")
    for name in inputs:
        if Path(name).resolve() == path.resolve():
            raise UserError(f"--output {output}: is the input itself; give another file")


def write_text(output: str, lines: Iterable[str]) -> None:
    """Write lines, each with its newline, all or nothing; an earlier file of that name stays until then.

    Raises:
        UserError: it cannot be written, as on a full disk.
    """
    with atomic_file(Path(output), f"--output {output}") as stream:
        stream.writelines(line.encode("utf-8") for line in lines)


def json_line(row: dict[str, Any]) -> str:
    """One line of a JSON Lines file."""
    return json.dumps(row, ensure_ascii=False) + "\n"
