"""Reads parts of the tensors in one of our checkpoints: without a model or unpickling, and only the bytes asked for.

Weights and buffers of the model alone: the optimizer's state and the generators' are left out.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_moe.checkpoint.convert.blocks import Box
from megatron_moe.checkpoint.convert.describe import plain_norm, stack, unstacked
from megatron_moe.checkpoint.convert.ranges import Files
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.safe_archive import FileSlice, load_archive
from megatron_moe.checkpoint.stored_tensor import StoredTensor, check_remainder, check_whole, find_tensor, read_box
from megatron_moe.checkpoint.torch_metadata import check_folder, read_metadata
from megatron_moe.config.base import UserError

# What a checkpoint holds beside the model (`checkpoint/save.py`).
_NOT_MODEL = ("optimizer.", "rng_state", "chained_", "common_state")


class _Chunks:
    """Where the parts of one stored tensor lie."""

    def __init__(self, entry: TensorStorageMetadata) -> None:
        self.info = TensorInfo(tuple(entry.size), entry.properties.dtype)
        self.starts = np.array([tuple(chunk.offsets) for chunk in entry.chunks], dtype=np.int64)
        self.sizes = np.array([tuple(chunk.sizes) for chunk in entry.chunks], dtype=np.int64)
        self.places: list[tuple[str, int, int]] = []
        """File, first byte and length of each."""


class OursSource:
    """The model's tensors in a checkpoint folder (`RUN/iter_0000100`), layers always in their names.

    Args:
        folder: the checkpoint.
        ours: whether to refuse what only checkpoints of another program hold, and give norms one name, whichever
            --transformer-impl wrote them.

    Raises:
        UserError: the checkpoint is damaged.
    """

    def __init__(self, folder: Path, *, ours: bool = True) -> None:
        if ours:
            check_folder(folder)
        metadata = read_metadata(folder)
        self._files = Files(folder)
        self._stored: dict[str, _Chunks] = {}
        self.infos: dict[str, TensorInfo] = {}
        # Where they have another name in the checkpoint.
        self._fused: dict[str, str] = {}
        # What this process has found in files, and whether all of its bytes were held against their checksum.
        self._found: dict[tuple[str, int], StoredTensor | None] = {}
        self._checked: set[tuple[str, int]] = set()
        for key, entry in metadata.state_dict_metadata.items():
            if key.startswith(_NOT_MODEL) or not isinstance(entry, TensorStorageMetadata):
                continue
            chunks = _Chunks(entry)
            for chunk in entry.chunks:
                place = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
                chunks.places.append((place.relative_path, place.offset, place.length))
            self._stored[key] = chunks
            for name, info in unstacked(key, chunks.info):
                plain = plain_norm(name) if ours else name
                if plain in self.infos:
                    raise UserError(f"{folder}: damaged: holds {plain} twice, fused with the layer behind it and apart")
                self.infos[plain] = info
                if plain != name:
                    self._fused[plain] = name

    def __getstate__(self) -> dict[str, object]:
        """Without what another process finds for itself."""
        return {**vars(self), "_found": {}, "_checked": set()}

    @property
    def paths(self) -> list[Path]:
        """The files with numbers in them."""
        return sorted({self._files.folder / place[0] for chunks in self._stored.values() for place in chunks.places})

    def read(self, box: Box) -> Tensor:
        """A part of a tensor."""
        out = torch.empty(box.size, dtype=self.infos[box.name].dtype)
        self.read_into(box, out)
        return out

    def read_into(self, box: Box, out: Tensor) -> None:
        """A part of a tensor, into memory of its dtype and size.

        Raises:
            UserError: the file is damaged.
        """
        box = dataclasses.replace(box, name=self._fused.get(box.name, box.name))
        if box.name not in self._stored:
            box = stack(box)
            out = out[None]
        chunks = self._stored[box.name]
        begin, end = np.array(box.start, dtype=np.int64), np.array(box.stop, dtype=np.int64)
        low = np.maximum(chunks.starts, begin)
        high = np.minimum(chunks.starts + chunks.sizes, end)
        filled = 0
        for index in np.flatnonzero((low < high).all(axis=1)):
            inside = (low[index] - chunks.starts[index]).tolist()
            place = [slice(a, b) for a, b in zip(low[index] - begin, high[index] - begin, strict=True)]
            target = out[tuple(place)]
            self._read(box.name, chunks, int(index), inside, target)
            filled += target.numel()
        # `.metadata` was held against its own sums; parts that lie over one another would leave others open.
        if filled != box.numel:
            raise UserError(f"{self._files.folder}: damaged: parts of {box.name} are stored twice, or not at all")

    def _read(self, key: str, chunks: _Chunks, index: int, start: list[int], target: Tensor) -> None:
        name, offset, length = chunks.places[index]
        place, shape = (name, offset), tuple(chunks.sizes[index].tolist())
        source = f"{self._files.folder / name} at byte {offset}"
        if place not in self._found:
            self._found[place] = self._find(name, offset, length, source)
        stored = self._found[place]
        if stored is None:
            # Stored in a way of which torch alone knows how to read a part: all of it.
            tensor = self._load(name, offset, length, source)
            _expect(tensor, shape, chunks.info.dtype, key, source)
            window = tuple(slice(first, first + size) for first, size in zip(start, target.shape, strict=True))
            target.copy_(tensor[window])
            return
        _expect(stored, shape, chunks.info.dtype, key, source)
        descriptor = self._files[name]
        reading = read_box(descriptor, stored, start, target)
        if place in self._checked:
            return
        if reading.nbytes == stored.nbytes:
            check_remainder(stored, reading.remainder)
        else:
            check_whole(descriptor, stored)
        self._checked.add(place)

    def _find(self, name: str, offset: int, length: int, source: str) -> StoredTensor | None:
        with (self._files.folder / name).open("rb") as stream:
            return find_tensor(FileSlice(stream, offset, length), source)

    def _load(self, name: str, offset: int, length: int, source: str) -> Tensor:
        with (self._files.folder / name).open("rb") as stream:
            tensor = load_archive(FileSlice(stream, offset, length), source)
        if type(tensor) is not Tensor or tensor.layout != torch.strided:
            raise UserError(f"{source}: damaged (it is no tensor)")
        return tensor


def _expect(found: Tensor | StoredTensor, shape: tuple[int, ...], dtype: torch.dtype, key: str, source: str) -> None:
    if tuple(found.shape) != shape or found.dtype != dtype:
        raise UserError(f"{source}: damaged (it is not {key} of shape {list(shape)} and {dtype})")
