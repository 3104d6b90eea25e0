"""Reads `.metadata`, the index of a distributed checkpoint, without trusting it.

torch's `FileSystemReader.read_metadata` (torch/distributed/checkpoint/filesystem.py) unpickles the file, which runs
any code that somebody put into it. Here the pickle is read as data, torch's objects are made anew from what was
found, and every entry is held against the files beside it: a name that leads out of the folder, a place behind the end
of a file or a tensor larger than its bytes is an error before anything is allocated.

One field is left out: torch 2.15 added `TensorProperties.strides`, which
`megatron/core/dist_checkpointing/strategies/torch.py:TorchDistLoadShardedStrategy.load_tensors_metadata` hands to
`torch.empty`, and that knows no such argument. Nothing reads it.
"""

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_moe.checkpoint.safe_pickle import Record, Reference, read_pickle
from megatron_moe.config.base import UserError

FILE = ".metadata"
# megatron/core/dist_checkpointing: core.py:CONFIG_FNAME, and strategies/common.py:COMMON_STATE_FNAME, which Megatron
# had before torch_dist. Not imported from there: to convert a checkpoint takes no megatron-core.
FORMAT_FILE = "metadata.json"
LEGACY_COMMON_FILE = "common.pt"
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_METADATA, _PLANNER = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"
_STORAGE_INFO = "torch.distributed.checkpoint.filesystem._StorageInfo"
_ALLOWED = frozenset(
    {
        *_DTYPES,
        *(
            f"{_METADATA}.{name}"
            for name in (
                "Metadata",
                "TensorStorageMetadata",
                "TensorProperties",
                "_MEM_FORMAT_ENCODING",
                "ChunkStorageMetadata",
                "BytesStorageMetadata",
                "MetadataIndex",
                "StorageMeta",
            )
        ),
        # The plans of the ranks that wrote it; megatron-core adds them, reading ignores them.
        *(f"{_PLANNER}.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        _STORAGE_INFO,
        "torch.Size",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
    }
)


class _Wrong(Exception):
    """An entry is not what it should be."""


def read_metadata(folder: Path) -> Metadata:
    """The index of a checkpoint; read once as long as the file stays the same.

    Raises:
        UserError: there is none, it is damaged, refers to what no checkpoint needs, or does not fit its files.
    """
    path = folder / FILE
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; the checkpoint is not whole") from error
    return _read(path, (status.st_ino, status.st_mtime_ns, status.st_size))


def check_folder(folder: Path) -> None:
    """Refuse a folder that upstream would read in an older way, and one whose index is not sound.

    Raises:
        UserError: the reason.
    """
    legacy = folder / LEGACY_COMMON_FILE
    if legacy.exists():
        raise UserError(f"{legacy}: no checkpoint of this program holds such a file; remove it, or give another --load")
    read_metadata(folder)
    config = folder / FORMAT_FILE
    try:
        if not isinstance(json.loads(config.read_text(encoding="utf-8")), dict):
            raise UserError(f"{config}: damaged, holds no description of a checkpoint")
    except OSError as error:
        raise UserError(f"{config}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{config}: damaged, not JSON ({str(error)[:80]})") from error


@lru_cache(maxsize=1)
def _read(path: Path, _status: tuple[int, ...]) -> Metadata:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return _Builder(path.parent).metadata(read_pickle(content, _ALLOWED, str(path)))
    except _Wrong as error:
        raise UserError(
            f"{path}: damaged, or not a checkpoint of this program: {error}; restore it or load another step"
        ) from error


class _Builder:
    """Makes torch's objects from records, checking each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sizes: dict[str, int] = {}

    def metadata(self, record: Any) -> Metadata:
        fields = _state(record, f"{_METADATA}.Metadata")
        storage = {}
        for key, value in _get(fields, "storage_data", dict).items():
            index = self._index(key)
            storage[index] = self._storage(index, value)
        entries: dict[str, Any] = {}
        for key, value in _get(fields, "state_dict_metadata", dict).items():
            if not isinstance(key, str):
                raise _Wrong(f"a tensor's name is a {type(key).__name__}")
            if _is(value, f"{_METADATA}.BytesStorageMetadata"):
                entries[key] = BytesStorageMetadata()
                _find(storage, MetadataIndex(key))
            else:
                entries[key] = self._tensor(key, value, storage)
        return Metadata(entries, planner_data=None, storage_data=storage, storage_meta=StorageMeta())

    def _index(self, record: Any) -> MetadataIndex:
        fields = _state(record, f"{_METADATA}.MetadataIndex")
        offset, place = fields.get("offset"), fields.get("index")
        if place is not None and not _is_count(place):
            raise _Wrong("an index is no number")
        return MetadataIndex(_get(fields, "fqn", str), None if offset is None else _size(offset), place)

    def _storage(self, index: MetadataIndex, record: Any) -> _StorageInfo:
        fields = _state(record, _STORAGE_INFO)
        name: Any = fields.get("relative_path")
        offset, length = _get(fields, "offset", int), _get(fields, "length", int)
        # A plain name: `..`, a slash or a backslash would lead elsewhere.
        if not isinstance(name, str) or not name or name in (".", "..") or set(name) & set("/\\\0"):
            raise _Wrong(f"{index.fqn[:80]!r} is said to lie in {str(name)[:80]!r}, which is no file of the folder")
        if not _is_count(offset) or not _is_count(length):
            raise _Wrong(f"{index.fqn[:80]!r} has no place")
        if fields.get("transform_descriptors"):
            raise _Wrong(f"{index.fqn[:80]!r} is stored transformed, which this program does not do")
        held = self._file_size(name)
        if offset + length > held:
            raise UserError(
                f"{self._folder / name}: cut short, or .metadata beside it is damaged: {index.fqn[:80]!r} is said "
                f"to end at byte {offset + length}, it holds {held}"
            )
        return _StorageInfo(name, offset, length)

    def _file_size(self, name: str) -> int:
        if name not in self._sizes:
            try:
                self._sizes[name] = os.stat(self._folder / name).st_size
            except OSError as error:
                raise UserError(
                    f"{self._folder / name[:80]}: {error.strerror}; .metadata beside it names it as a part of the "
                    "checkpoint"
                ) from error
        return self._sizes[name]

    def _tensor(self, key: str, record: Any, storage: dict[MetadataIndex, _StorageInfo]) -> TensorStorageMetadata:
        fields = _state(record, f"{_METADATA}.TensorStorageMetadata")
        properties, size = _properties(fields.get("properties")), _size(fields.get("size"))
        chunks = [_chunk(chunk, size, key) for chunk in _get(fields, "chunks", list)]
        for chunk in chunks:
            held = _find(storage, MetadataIndex(key, chunk.offsets)).length
            needed = math.prod(chunk.sizes) * properties.dtype.itemsize
            if needed > held:
                raise _Wrong(f"{key[:80]!r} takes {needed} bytes but only {held} are there")
        stored = sum(math.prod(chunk.sizes) for chunk in chunks)
        if stored != math.prod(size):
            raise _Wrong(f"{key[:80]!r} has {math.prod(size)} numbers, but {stored} are stored")
        return TensorStorageMetadata(properties, size, chunks)


def _chunk(record: Any, size: torch.Size, key: str) -> ChunkStorageMetadata:
    fields = _state(record, f"{_METADATA}.ChunkStorageMetadata")
    offsets, sizes = _size(fields.get("offsets")), _size(fields.get("sizes"))
    if not len(offsets) == len(sizes) == len(size) or any(
        start + length > whole for start, length, whole in zip(offsets, sizes, size, strict=True)
    ):
        raise _Wrong(f"{key[:80]!r} has a part outside of itself")
    return ChunkStorageMetadata(offsets, sizes)


def _properties(record: Any) -> TensorProperties:
    """Only the dtype of them tells anything; see the module's text about `strides`."""
    if not _is(record, f"{_METADATA}.TensorProperties") or not isinstance(record.state, tuple) or not record.state:
        raise _Wrong("a tensor has no properties")
    dtype = record.state[0]
    if not isinstance(dtype, Reference) or str(dtype) not in _DTYPES:
        raise _Wrong("a tensor has no type")
    properties = TensorProperties(dtype=_DTYPES[str(dtype)])
    vars(properties).pop("strides", None)
    return properties


def _size(record: Any) -> torch.Size:
    if not _is(record, "torch.Size") or len(record.args) != 1 or not isinstance(record.args[0], tuple):
        raise _Wrong("a shape is none")
    if not all(_is_count(item) for item in record.args[0]):
        raise _Wrong("a shape holds what is no length")
    return torch.Size(record.args[0])


def _find(storage: dict[MetadataIndex, _StorageInfo], index: MetadataIndex) -> _StorageInfo:
    if index not in storage:
        raise _Wrong(f"{index.fqn[:80]!r} is stored nowhere")
    return storage[index]


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Record) and str(value.made_by) == name


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _state(record: Any, name: str) -> dict[Any, Any]:
    if not _is(record, name) or not isinstance(record.state, dict):
        raise _Wrong(f"no {name.rpartition('.')[2]} where one belongs")
    return record.state


def _get(fields: dict[Any, Any], key: str, kind: type) -> Any:
    value = fields.get(key)
    if not isinstance(value, kind):
        raise _Wrong(f"{key} is no {kind.__name__}")
    return value
