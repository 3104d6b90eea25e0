"""What megatron-core reads checkpoints through: torch's reader, but nothing in a file can run code or lead elsewhere.

Three of upstream's ways to read are replaced: `.metadata` is pickle.load in torch/distributed/checkpoint/filesystem.py
(`FileSystemReader.read_metadata`), objects are torch.load(weights_only=False) in default_planner.py
(`DefaultLoadPlanner.load_bytes`), and tensors are read whole, without a look at their archive
(`FileSystemReader.read_data`). Here a rank reads the bytes that it needs, straight to where they belong.
"""

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_moe.checkpoint.part_checks import PartsRead
from megatron_moe.checkpoint.safe_archive import FileSlice, load_archive
from megatron_moe.checkpoint.stored_tensor import find_tensor, read_box
from megatron_moe.checkpoint.torch_metadata import read_metadata
from megatron_moe.config.base import UserError
from megatron_moe.runtime.replace import Replacement


class _Bytes(io.BytesIO):
    """An object's bytes, and where they come from."""

    source = "an object of the checkpoint"


class SafeReader(FileSystemReader):
    """Reads `.metadata` as data, and of the data files only plain tensors and values."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See `torch_metadata.read_metadata`."""
        metadata = read_metadata(Path(self.path))
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Upstream's loop, with every part checked before it is unpacked, and of tensors only what is asked for.

        Checksums of parts that are read are compared here, unless somebody does so later (`parts_read`).

        Raises:
            UserError: a part is damaged, or not what `.metadata` says it is.
        """
        read = PartsRead() if _parts_read is None else _parts_read
        of_file: dict[str, list[ReadItem]] = defaultdict(list)
        for item in plan.items:
            of_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in of_file.items():
            path = Path(self.path) / name
            with path.open("rb") as stream:
                for item in items:
                    place = self.storage_data[item.storage_index]
                    part = FileSlice(stream, place.offset, place.length)
                    source = f"{path} at byte {place.offset}"
                    if item.type == LoadItemType.BYTE_IO:
                        value = _Bytes(part.read())
                        value.source = source
                        planner.load_bytes(item, value)
                    else:
                        _load_tensor(part, item, planner, source, read)
        if read is not _parts_read:
            read.check_alone()
        done: Future[None] = Future()
        done.set_result(None)
        return done


_parts_read: PartsRead | None = None


@contextlib.contextmanager
def parts_read() -> Iterator[PartsRead]:
    """What is read from here on; whoever asks must have it checked (`PartsRead.check_together`) before it is used."""
    global _parts_read
    assert _parts_read is None
    _parts_read = PartsRead()
    try:
        yield _parts_read
    finally:
        _parts_read = None


def _load_tensor(part: FileSlice, item: ReadItem, planner: Any, source: str, read: PartsRead) -> None:
    index = item.storage_index
    entry: Any = planner.metadata.state_dict_metadata[index.fqn]
    sizes = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset)
    stored = find_tensor(part, source)
    tensor: Any = stored if stored is not None else load_archive(part, source)
    if stored is None and (type(tensor) is not torch.Tensor or tensor.layout != torch.strided):
        raise UserError(f"{source}: damaged (it is not {index.fqn} of shape {tuple(sizes)})")
    if tuple(tensor.shape) != tuple(sizes):
        raise UserError(f"{source}: damaged (it is not {index.fqn} of shape {tuple(sizes)})")
    if tensor.dtype != entry.properties.dtype:
        raise UserError(f"{source}: damaged ({index.fqn} is {tensor.dtype}, not {entry.properties.dtype})")
    target = planner.resolve_tensor(item).detach()
    if stored is not None:
        start = tuple(item.storage_offsets)
        reading = read_box(part.fileno(), stored, start, target)
        read.add(part.path, stored, start, tuple(target.shape), reading)
    else:
        target.copy_(narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))
    planner.commit_tensor(item, target)


def load_bytes(planner: Any, item: ReadItem, value: io.BytesIO) -> None:
    """`DefaultLoadPlanner.load_bytes`, without code in the file."""
    name = item.dest_index.fqn
    content = load_archive(value, getattr(value, "source", name))
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], content)
    else:
        planner.state_dict[name] = content


def filesystem_reader(checkpoint_dir: Any, cache_metadata: bool = False, async_strategy: str = "mcore") -> SafeReader:
    """`_get_filesystem_reader`; metadata is always cached."""
    return SafeReader(checkpoint_dir)


def user_error(error: BaseException) -> UserError | None:
    """The clear error inside what torch gathered from ranks, if it is one."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, CheckpointException):
        return next((failure for failure, _ in error.failures.values() if isinstance(failure, UserError)), None)
    return None


_REASON = "it would run the code that a pickle in a checkpoint holds"
REPLACEMENTS = [
    # The same function by the two names it is called by.
    Replacement(
        "megatron.core.dist_checkpointing.strategies.torch", "_get_filesystem_reader", filesystem_reader, _REASON
    ),
    Replacement("megatron.core.dist_checkpointing.serialization", "_get_filesystem_reader", filesystem_reader, _REASON),
    Replacement("torch.distributed.checkpoint.default_planner:DefaultLoadPlanner", "load_bytes", load_bytes, _REASON),
]
