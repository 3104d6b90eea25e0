"""Reads and writes folders of safetensors files: one `model.safetensors`, or shards and their index.

The safetensors library keeps whole tensors in memory to write them, and says of a damaged file what a programmer
understands. Here files are read by byte ranges, and written by processes that each put their tensors where they belong:
all sizes are known beforehand, so every header is written before the first number.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Box, Side
from megatron_moe.checkpoint.convert.ranges import Files, are_of_size, as_bytes, interleave, read_box, split, write_run
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.text_files import read_at_most
from megatron_moe.config.base import UserError, disk_error

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# At most what a worker holds of a tensor at a time.
PIECE_BYTES = 128 << 20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# The library's own bound (safetensors/src/tensor.rs:MAX_HEADER_SIZE).
_LARGEST_HEADER = 100_000_000
_MOST_AXES = 16
# What file systems take.
_LONGEST_NAME = 255
_LARGEST_SIZE = 2**48


class _Repeated(ValueError):
    """A JSON object that has a key twice."""


class SafetensorsSource:
    """The tensors of a folder, or of one file.

    Raises:
        UserError: there are none, or a file is missing, damaged, cut short or not what the index says.
    """

    def __init__(self, folder: str | Path) -> None:
        given = Path(folder)
        self._files = Files(given.parent if given.is_file() else given)
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[str, int]] = {}
        for shard, expected in _shards(given).items():
            self._add(shard, expected)

    @property
    def paths(self) -> list[Path]:
        """The files with numbers in them."""
        return sorted({self._files.folder / shard for shard, _ in self._places.values()})

    def read(self, box: Box) -> Tensor:
        """A part of a tensor."""
        out = torch.empty(box.size, dtype=self.infos[box.name].dtype)
        self.read_into(box, out)
        return out

    def read_into(self, box: Box, out: Tensor) -> None:
        """A part of a tensor, into contiguous memory of its dtype and size."""
        shard, offset = self._places[box.name]
        read_box(self._files, shard, offset, self.infos[box.name].shape, box.start, box.size, out)

    def _add(self, shard: str, expected: set[str] | None) -> None:
        infos, offsets = read_header(self._files.folder / shard)
        if expected is not None and (absent := sorted(expected - infos.keys())):
            raise UserError(
                f"{self._files.folder / INDEX_FILE}: says that {absent[0]} lies in {shard}, but it is not there; the "
                "files are of different models, or one is damaged: fetch them again"
            )
        for name, info in infos.items():
            if name in self._places:
                raise UserError(f"{self._files.folder}: both {self._places[name][0]} and {shard} hold {name}")
            if expected is not None and name not in expected:
                raise UserError(f"{self._files.folder / shard}: holds {name}, which {INDEX_FILE} does not say")
            self.infos[name] = info
            self._places[name] = (shard, offsets[name])


def _shards(given: Path) -> dict[str, set[str] | None]:
    """File names, and which tensors the index says are in each."""
    if given.is_file():
        return {given.name: None}
    if not given.is_dir():
        raise UserError(f"{given}: no such folder; give the folder of a Hugging Face checkpoint")
    index = given / INDEX_FILE
    if not index.exists():
        if (given / SINGLE_FILE).exists():
            return {SINGLE_FILE: None}
        others = sorted(path.name for path in given.glob("*.safetensors"))
        reason = f"{others[0]} is there, but {INDEX_FILE} is not" if others else "it holds no safetensors file"
        raise UserError(f"{given}: {reason}; fetch the whole checkpoint, or convert it to safetensors first")
    shards: dict[str, set[str] | None] = {}
    for name, shard in _weight_map(index).items():
        shards.setdefault(shard, set()).add(name)  # type: ignore[union-attr]
    if SINGLE_FILE not in shards and (given / SINGLE_FILE).exists():
        raise UserError(f"{given}: holds both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is not the model")
    missing = sorted(shard for shard in shards if not (given / shard).exists())
    if missing:
        raise UserError(
            f"{given / missing[0]}: is missing, {INDEX_FILE} names it ({len(missing)} of {len(shards)} are)"
        )
    return dict(sorted(shards.items()))


def _weight_map(index: Path) -> dict[str, str]:
    content = _json(index, read_at_most(index, _LARGEST_HEADER))
    found = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index}: damaged, it has no weight_map")
    for name, shard in found.items():
        # A plain name: `..` or a slash would lead elsewhere.
        plain = isinstance(shard, str) and shard.endswith(".safetensors") and not set(shard) & set("/\\\0")
        if not plain or len(shard.encode(errors="replace")) > _LONGEST_NAME:
            raise UserError(f"{index}: says that {name[:80]} lies in {str(shard)[:80]!r}, which is no safetensors file")
    return found


def _json(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content, object_pairs_hook=_no_repeats)
    except _Repeated as error:
        raise UserError(f"{path}: damaged, holds {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, its description is not JSON ({str(error)[:80]})") from error


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _Repeated(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """What a file holds: tensors by name, and the byte at which each begins.

    Raises:
        UserError: it is damaged, cut short, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            held = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if held < 8 or length > min(held - 8, _LARGEST_HEADER):
                raise UserError(
                    f"{path}: damaged or cut short: its first bytes announce a description of {length} bytes, it holds "
                    f"{held}; fetch it again"
                )
            content = stream.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    entries = _json(path, content)
    if not isinstance(entries, dict):
        raise UserError(f"{path}: damaged, its description is no list of tensors")
    infos, places = {}, {}
    for name, entry in entries.items():
        if name != "__metadata__":
            infos[name], places[name] = _entry(path, name, entry)
    end = 0
    for name, begin in sorted(places.items(), key=lambda item: (item[1], infos[item[0]].nbytes)):
        if begin != end:
            raise UserError(f"{path}: damaged: {name} begins at byte {begin} of the data, where {end} was expected")
        end += infos[name].nbytes
    if held != 8 + length + end:
        what = "cut short" if held < 8 + length + end else "damaged, has bytes behind its end"
        raise UserError(f"{path}: {what}: holds {held} bytes, its description says {8 + length + end}; fetch it again")
    return infos, {name: 8 + length + begin for name, begin in places.items()}


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UserError(f"{path}: damaged: {name[:80]} is not described")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise UserError(f"{path}: {name[:80]} is of type {str(dtype)[:20]}; known are {', '.join(_DTYPES)}")
    lists = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not lists or not all(type(item) is int and 0 <= item < 2**63 for item in [*shape, *offsets]):
        raise UserError(f"{path}: damaged: {name[:80]} has no shape or no place")
    # Before they are multiplied: a long list of large numbers takes minutes.
    if len(shape) > _MOST_AXES or max(shape, default=0) > _LARGEST_SIZE:
        raise UserError(f"{path}: damaged: {name[:80]} has {len(shape)} axes of up to {max(shape)}, as no weight has")
    info = TensorInfo(tuple(shape), _DTYPES[dtype])
    if offsets[1] - offsets[0] != info.nbytes:
        raise UserError(f"{path}: damaged: {name[:80]} takes {info.nbytes} bytes, its place is another size")
    return info, offsets[0]


class SafetensorsWriter:
    """Writes tensors into the files of a folder, in any order and from several processes.

    Args:
        folder: where; `prepare` makes it.
        infos: every tensor in the order of the model; shards are filled in that order.
        shard_bytes: at most in a file, unless one tensor is larger.
    """

    def __init__(self, folder: Path, infos: Mapping[str, TensorInfo], shard_bytes: int = SHARD_BYTES) -> None:
        for name, info in infos.items():
            if info.dtype not in _NAMES:
                raise UserError(f"{name}: safetensors files cannot hold {info.dtype}; choose another dtype")
        self.side: Side = "theirs"
        self.infos = dict(infos)
        self._files = Files(folder, writable=True)
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._places: dict[str, tuple[str, int]] = {}
        shards = _fill_shards(infos, shard_bytes)
        for number, names in enumerate(shards, 1):
            shard = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._lay_out(shard, names)

    @property
    def total_bytes(self) -> int:
        """On disk, without the index."""
        return sum(self._sizes.values())

    @property
    def files(self) -> list[Path]:
        """Of tensors."""
        return [self._files.folder / shard for shard in self._headers]

    @property
    def pieces(self) -> list[Box]:
        """What is to be written; neighbours lie in different files, as two processes that write into one wait for each
        other."""
        of_shard: dict[str, list[Box]] = {shard: [] for shard in self._headers}
        for name, (shard, _) in self._places.items():
            info = self.infos[name]
            for start, size in split(info.shape, PIECE_BYTES // info.dtype.itemsize):
                of_shard[shard].append(Box(name, start, size))
        return interleave(of_shard.values())

    @property
    def is_prepared(self) -> bool:
        """Whether the files are there, of their full size."""
        return are_of_size(self._files.folder, self._sizes)

    def prepare(self) -> None:
        """Make the files, with their headers, of their full size.

        Raises:
            UserError: they cannot be written.
        """
        for shard, header in self._headers.items():
            path = self._files.folder / shard
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as stream:
                    stream.write(header)
                    stream.truncate(self._sizes[shard])
            except OSError as error:
                raise disk_error(str(path), error) from error

    def write(self, piece: Box, values: Tensor) -> None:
        """Write a piece: contiguous, of the tensor's dtype.

        Raises:
            UserError: the disk is full, or the file has gone.
        """
        info = self.infos[piece.name]
        assert values.dtype == info.dtype
        shard, offset = self._places[piece.name]
        for axis, first in enumerate(piece.start):
            offset += first * math.prod(info.shape[axis + 1 :]) * info.dtype.itemsize
        write_run(self._files, shard, offset, as_bytes(values))

    def finish(self) -> None:
        """Write the index of what lies in the files; needed, and allowed, once all pieces are written.

        Raises:
            UserError: it cannot be written.
        """
        self._files.close()
        weight_map: dict[str, str] = {}
        total = 0
        for shard in self._headers:
            infos, _ = read_header(self._files.folder / shard)
            weight_map |= dict.fromkeys(infos, shard)
            total += sum(info.nbytes for info in infos.values())
        if len(self._headers) == 1:
            return
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        path = self._files.folder / INDEX_FILE
        try:
            path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise disk_error(str(path), error) from error

    def _lay_out(self, shard: str, names: list[str]) -> None:
        # As the library does: the widest numbers first, so that every tensor begins at a multiple of its width.
        names = sorted(names, key=lambda name: (-self.infos[name].dtype.itemsize, name))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            info = self.infos[name]
            offsets = [end, end + info.nbytes]
            entries[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": offsets}
            end += info.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._headers[shard] = len(text).to_bytes(8, "little") + text
        self._sizes[shard] = 8 + len(text) + end
        for name in names:
            self._places[name] = (shard, 8 + len(text) + entries[name]["data_offsets"][0])


def _fill_shards(infos: Mapping[str, TensorInfo], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, info in infos.items():
        if shards[-1] and used + info.nbytes > most:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += info.nbytes
    return shards
