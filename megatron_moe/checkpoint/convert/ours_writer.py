"""Writes a checkpoint of ours tensor by tensor, from several processes, without a model or process groups.

What megatron-core's distributed checkpointing loads under any layout: `.metadata` (torch's index, as
`torch/distributed/checkpoint/filesystem.py:FileSystemWriter.finish` pickles it), parts of tensors in `.distcp` files,
the empty states of linear layers, and a common state, which says that these are weights alone.
"""

import io
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
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

from megatron_moe.checkpoint.convert.archive import archive_length, write_archive
from megatron_moe.checkpoint.convert.blocks import Box, Side
from megatron_moe.checkpoint.convert.describe import CheckpointModel, unstack
from megatron_moe.checkpoint.convert.ranges import Files, are_of_size, interleave, split, write_run
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.layout import LATEST_FILE, WEIGHTS_ONLY, checkpoint_folder
from megatron_moe.checkpoint.torch_metadata import FILE as METADATA_FILE
from megatron_moe.checkpoint.torch_metadata import FORMAT_FILE
from megatron_moe.config.base import disk_error

PIECE_BYTES = 128 << 20
# Processes that write into one file wait for each other.
_FILE_BYTES = 10**9
_COMMON = "common_state/shard_0_1"
# megatron/core/dist_checkpointing/core.py:CheckpointingConfig.
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@dataclass(frozen=True, slots=True)
class _Part:
    """A box of a stored tensor, and where it lies."""

    box: Box
    dtype: torch.dtype
    file: str
    offset: int

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.box.size, self.dtype)


class OursWriter:
    """Writes a run's folder with one checkpoint in it, `iter_0000000`, in any order and from several processes.

    Args:
        folder: the run's.
        model: what it holds (`describe.py:describe`); parts are stored in the boxes given there, large ones cut up.
        source: says in messages where the weights come from.
    """

    def __init__(self, folder: Path, model: CheckpointModel, source: str) -> None:
        self.side: Side = "ours"
        self.infos = model.infos
        self._run_folder = folder
        self.folder = checkpoint_folder(folder, 0)
        self._files = Files(self.folder, writable=True)
        self._shapes = {key: stored.info for key, stored in model.tensors.items()}
        self._objects: dict[str, tuple[int, int]] = {}
        self._head = self._lay_out_objects(model, source)
        self._parts: dict[Box, _Part] = {}
        self._sizes = {_file(0): len(self._head)}
        for key, stored in model.tensors.items():
            for chunk in stored.chunks:
                self._lay_out(key, chunk, stored.info.dtype)

    @property
    def total_bytes(self) -> int:
        """On disk, without the index."""
        return sum(self._sizes.values())

    @property
    def files(self) -> list[Path]:
        """Of tensors."""
        return [self.folder / name for name in self._sizes]

    @property
    def pieces(self) -> list[Box]:
        """What is to be written; neighbours lie in different files."""
        of_file: dict[str, list[Box]] = {name: [] for name in self._sizes}
        for piece, part in self._parts.items():
            of_file[part.file].append(piece)
        return interleave(of_file.values())

    @property
    def is_prepared(self) -> bool:
        """Whether the files are there, of their full size."""
        return are_of_size(self.folder, self._sizes)

    def prepare(self) -> None:
        """Make the files, of their full size.

        Raises:
            UserError: they cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, size in self._sizes.items():
                with (self.folder / name).open("wb") as stream:
                    stream.truncate(size)
        except OSError as error:
            raise disk_error(str(self.folder), error) from error
        write_run(self._files, _file(0), 0, self._head)

    def write(self, piece: Box, values: Tensor) -> None:
        """Write a piece: contiguous, of the tensor's dtype.

        Raises:
            UserError: the disk is full, or the file has gone.
        """
        part = self._parts[piece]
        write_archive(self._files, part.file, part.offset, part.info, values)

    def finish(self) -> None:
        """Write the index, and the file that names the checkpoint; needed once all pieces are written.

        Raises:
            UserError: it cannot be written.
        """
        self._files.close()
        try:
            (self.folder / METADATA_FILE).write_bytes(pickle.dumps(self._metadata()))
            (self.folder / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")
            (self._run_folder / LATEST_FILE).write_text("0\n", encoding="utf-8")
        except OSError as error:
            raise disk_error(str(self.folder), error) from error

    def _lay_out_objects(self, model: CheckpointModel, source: str) -> bytes:
        """Everything that is no tensor, as bytes; takes note of what lies where in them."""
        # Not at the top: the processes that write tensors need no megatron-core, which takes seconds to import.
        from megatron_moe.checkpoint.optimizer_state import METADATA

        # What megatron-core makes of objects: lists of one (dist_checkpointing/strategies/torch.py).
        empty = _saved([None])
        plain = {name: value for name, value in METADATA.items() if isinstance(value, (str, bool))}
        common = _saved([{WEIGHTS_ONLY: source, "content_metadata": plain}])
        self._objects = dict.fromkeys(model.objects, (0, len(empty)))
        self._objects[_COMMON] = (len(empty), len(common))
        return empty + common

    def _lay_out(self, key: str, chunk: Box, dtype: torch.dtype) -> None:
        for start, size in split(chunk.size, PIECE_BYTES // dtype.itemsize):
            box = Box(key, tuple(first + step for first, step in zip(chunk.start, start, strict=True)), size)
            length = archive_length(TensorInfo(size, dtype))
            file = _file(len(self._sizes) - 1)
            if self._sizes[file] + length > _FILE_BYTES and self._sizes[file] > len(self._head):
                file = _file(len(self._sizes))
                self._sizes[file] = 0
            # One layer of a stack has one layer's tensor for its target.
            (piece,) = unstack(box)
            self._parts[piece] = _Part(box, dtype, file, self._sizes[file])
            self._sizes[file] += length

    def _metadata(self) -> Metadata:
        chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in self._shapes}
        storage: dict[MetadataIndex, Any] = {}
        for part in self._parts.values():
            key, offset = part.box.name, torch.Size(part.box.start)
            chunks[key].append(ChunkStorageMetadata(offset, torch.Size(part.box.size)))
            storage[MetadataIndex(key, offset)] = _StorageInfo(part.file, part.offset, archive_length(part.info))
        entries: dict[str, Any] = {
            key: TensorStorageMetadata(TensorProperties(dtype=info.dtype), torch.Size(info.shape), chunks[key])
            for key, info in self._shapes.items()
        }
        for key, (begin, length) in self._objects.items():
            entries[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _StorageInfo(_file(0), begin, length)
        return Metadata(entries, planner_data=None, storage_data=storage, storage_meta=StorageMeta())


def _file(number: int) -> str:
    return f"__0_{number}.distcp"


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()
