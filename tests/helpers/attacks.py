"""Makes checkpoints that would run code when read carelessly, out of good ones."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Evil:
    """When unpickled, calls a function with arguments."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = (function, args)

    def __reduce__(self) -> Any:
        """What pickle stores: the call."""
        return self._call


def read_index(folder: Path) -> Any:
    """`.metadata` as torch reads it; of a checkpoint that a test has just written."""
    return pickle.loads((folder / ".metadata").read_bytes())


def write_index(folder: Path, metadata: Any) -> None:
    """Put another `.metadata` there."""
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def replace_object(folder: Path, prefix: str, content: Any) -> None:
    """Give the first entry whose name starts with `prefix` another content, behind the end of its file."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    replace_bytes(folder, prefix, buffer.getvalue())


def replace_bytes(folder: Path, prefix: str, content: bytes) -> None:
    """As `replace_object`, with bytes."""
    metadata = read_index(folder)
    index = next(index for index in metadata.storage_data if index.fqn.startswith(prefix))
    place = copy.copy(metadata.storage_data[index])
    with (folder / place.relative_path).open("ab") as stream:
        place.offset, place.length = stream.tell(), len(content)
        stream.write(content)
    metadata.storage_data[index] = place
    write_index(folder, metadata)
