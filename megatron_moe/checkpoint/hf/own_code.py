"""Code that lies in a folder runs only if it is what this version of the package would put there."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.hf.remote.family import AUTO_MAP, CODE_FILES, FAMILY
from megatron_moe.config.base import UserError

_SOURCE = Path(__file__).parent / "remote"


def may_run_code(folder: Path, config: Mapping[str, Any], flag: str = "--hf") -> bool:
    """Whether the folder is of our own class, with our own code in it, byte for byte.

    Native classes need no code: what a folder has besides is left alone.

    Raises:
        UserError: it is of our class, but with other code.
    """
    if config.get("model_type") != FAMILY.model_type:
        return False
    if config.get("auto_map") != AUTO_MAP:
        raise UserError(f"{flag} {folder}: auto_map of config.json is not the one of this version; its code is not run")
    for path in sorted(folder.glob("*.py")):
        if path.name not in CODE_FILES or path.read_bytes() != (_SOURCE / path.name).read_bytes():
            raise UserError(
                f"{flag} {folder}: {path.name} is not the code of this version, and is not run; export the run again, "
                "or restore the file"
            )
    if missing := [name for name in CODE_FILES if not (folder / name).is_file()]:
        raise UserError(f"{flag} {folder}: {missing[0]} is missing; export the run again")
    return True
