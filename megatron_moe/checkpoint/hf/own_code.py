"""Code that lies in a folder is never run: a folder of our own class is loaded with the code of this package.

The fresh process gets a folder of links to the files of the other one, with the package's code beside them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.hf.inspect import read_config
from megatron_moe.checkpoint.hf.remote.family import AUTO_MAP, CODE_FILES, FAMILY, copy_code

_SOURCE = Path(__file__).parent / "remote"
_CONFIG = "config.json"


def needs_code(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of our own class. Native classes need no code: what a folder has besides is left
    alone."""
    return config.get("model_type") == FAMILY.model_type


def with_own_code(folder: Path, stage: Path) -> str | None:
    """Make a folder that holds what `folder` holds, but this package's code.

    Args:
        folder: of our class.
        stage: the folder to make.

    Returns:
        How the code that it brings along differs, or None if it does not.
    """
    stage.mkdir()
    copy_code(stage)
    for path in folder.iterdir():
        if path.suffix != ".py" and path.name != _CONFIG:
            (stage / path.name).symlink_to(path.resolve())
    config = read_config(folder)
    (stage / _CONFIG).write_text(json.dumps({**config, "auto_map": AUTO_MAP}), encoding="utf-8")
    if config.get("auto_map") != AUTO_MAP:
        return "auto_map of config.json is not the one of this version"
    names = {path.name for path in folder.glob("*.py")}
    for name in sorted({*names, *CODE_FILES}):
        if name not in names:
            return f"{name} is missing"
        if name not in CODE_FILES or (folder / name).read_bytes() != (_SOURCE / name).read_bytes():
            return f"{name} is not the one of this version"
    return None
