"""Files of `torch.save`, opened without unpickling them: the pickle is read as data, a tensor when it is asked for.

Stricter than `torch.load(weights_only=True)`: nothing is imported or called, whatever the pickle names. What a
training checkpoint names besides tensors (arguments, generator states, an optimizer) becomes records; anything else is
refused by its name. Tensors keep their place in the file; the checksum of a storage is compared when it is first read.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_moe.checkpoint.safe_archive import FileSlice
from megatron_moe.checkpoint.safe_pickle import Persistent, Record, Reference, read_pickle
from megatron_moe.config.base import UserError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")
_PARAMETER = "torch._utils._rebuild_parameter"
_ORDERED = "collections.OrderedDict"
_NAMESPACES = ("argparse.Namespace", "types.SimpleNamespace")
# Names that become records; none of them is ever looked up.
_KNOWN = frozenset(
    {
        *_DTYPES,
        *(f"torch.{name}" for name in _STORAGES),
        *_TENSOR,
        *_NAMESPACES,
        _PARAMETER,
        _ORDERED,
        "torch.storage.UntypedStorage",
        "torch.Size",
        "torch.device",
        "collections.defaultdict",
        "builtins.set",
        "__builtin__.set",
        "builtins.dict",
        "__builtin__.dict",
        "_codecs.encode",
        "_io.BytesIO",
        "pathlib.PosixPath",
        "signal.Signals",
        "numpy.ndarray",
        "numpy.dtype",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
    }
)
_PROGRAMS = ("megatron.", "deepspeed.", "fp16.loss_scaler.")
_KIND = "checkpoint that is read here"
_HEADER = 30
_CHUNK = 1 << 20


class _Names(Collection[str]):
    """What a checkpoint may name: tensors and plain classes, and classes of the programs that write checkpoints."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in _KNOWN or name.startswith(_PROGRAMS))

    def __iter__(self) -> Iterator[str]:
        return iter(_KNOWN)

    def __len__(self) -> int:
        return len(_KNOWN)


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of a file that tensors share."""

    path: Path
    header: int
    """Where the archive's entry begins."""
    nbytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: its place in a storage, in numbers, as `torch.as_strided` takes it."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def reshaped(self, *shape: int) -> "StoredTensor":
        """Another shape of the same numbers; only for tensors that lie in order.

        Raises:
            UserError: the numbers do not fit the shape, or do not lie in order.
        """
        in_order = all(
            length == 1 or step == due
            for length, step, due in zip(self.shape, self.stride, _in_order(self.shape), strict=True)
        )
        if math.prod(shape) != math.prod(self.shape) or not in_order:
            raise UserError(f"{self.storage.path}: a tensor of shape {self.shape} cannot be {shape}")
        return replace(self, shape=shape, stride=_in_order(shape))

    def transposed(self, one: int, other: int) -> "StoredTensor":
        """The same tensor with two axes swapped."""
        shape, stride = list(self.shape), list(self.stride)
        shape[one], shape[other] = shape[other], shape[one]
        stride[one], stride[other] = stride[other], stride[one]
        return replace(self, shape=tuple(shape), stride=tuple(stride))

    def read(self, start: Sequence[int], size: Sequence[int], verified: set[tuple[Path, int]]) -> Tensor:
        """A part of it.

        Args:
            start: where the part begins, along every axis.
            size: how long it is.
            verified: storages whose checksum was right; this one is added.

        Raises:
            UserError: the file is damaged or has gone.
        """
        if not math.prod(size):
            return torch.empty(tuple(size), dtype=self.dtype)
        first = self.offset + sum(begin * step for begin, step in zip(start, self.stride, strict=True))
        count = 1 + sum((length - 1) * step for length, step in zip(size, self.stride, strict=True))
        storage, width = self.storage, self.dtype.itemsize
        try:
            with storage.path.open("rb") as stream:
                stream.seek(storage.header)
                header = stream.read(_HEADER)
                begin = storage.header + _HEADER + int.from_bytes(header[26:28], "little")
                begin += int.from_bytes(header[28:30], "little")
                if (key := (storage.path, storage.header)) not in verified:
                    stream.seek(begin)
                    _verify(stream, storage)
                    verified.add(key)
                stream.seek(begin + first * width)
                data = bytearray(count * width)
                if stream.readinto(data) != len(data):
                    raise UserError(f"{storage.path}: cut short")
        except OSError as error:
            raise UserError(f"{storage.path}: cannot be read: {error.strerror}") from error
        flat = torch.frombuffer(data, dtype=self.dtype)
        return flat.as_strided(tuple(size), self.stride).clone(memory_format=torch.contiguous_format)


def read_torch_file(path: Path, offset: int = 0, length: int | None = None) -> Any:
    """What a file of `torch.save` holds: dicts, lists and values, with a `StoredTensor` for every tensor; namespaces
    and ordered dicts are dicts, other objects are `Record`s.

    Args:
        path: the file.
        offset: where in it the archive begins.
        length: of the archive. Default: to the end.

    Raises:
        UserError: there is no such file, it is damaged, or names what no checkpoint of a model needs.
    """
    try:
        with path.open("rb") as stream, zipfile.ZipFile(_part(stream, offset, length)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                raise UserError(f"{path}: not a file of torch.save (no data.pkl in it)")
            for entry in entries.values():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise UserError(f"{path}: holds compressed data, which torch.save does not write")
            content = archive.read(pickles[0])
            root = pickles[0].removesuffix("data.pkl")
            if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{path}: written on a big-endian machine, which this program does not read")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{path}: {_why_no_archive(path)}") from error
    return _Builder(path, offset, root, entries).plain(read_pickle(content, _Names(), str(path), _KIND))


def _part(stream: BinaryIO, offset: int, length: int | None) -> FileSlice:
    return FileSlice(stream, offset, os.fstat(stream.fileno()).st_size - offset if length is None else length)


def _why_no_archive(path: Path) -> str:
    with path.open("rb") as stream:
        begin = stream.read(2)
    if begin[:1] == b"\x80":
        return (
            "written by torch before 1.6, or with _use_new_zipfile_serialization=False; load it there with "
            "torch.load and save it anew with torch.save"
        )
    return "cut short, or not a file of torch.save"


class _Builder:
    """Makes plain values and `StoredTensor`s of records."""

    def __init__(self, path: Path, offset: int, root: str, entries: dict[str, zipfile.ZipInfo]) -> None:
        self._path, self._offset, self._root, self._entries = path, offset, root, entries

    def plain(self, value: Any, depth: int = 0) -> Any:
        """The value with every tensor's record replaced."""
        if depth > 50:
            raise UserError(f"{self._path}: damaged (nested too deeply)")
        if isinstance(value, dict):
            return {key: self.plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.plain(item, depth + 1) for item in value)
        if not isinstance(value, Record):
            return value
        name = str(value.made_by)
        if name in _TENSOR:
            return self._tensor(value.args)
        if name == _PARAMETER and value.args:
            return self.plain(value.args[0], depth + 1)
        if name == _ORDERED:
            return self.plain(value.items, depth + 1)
        if name in _NAMESPACES and isinstance(value.state, dict):
            return self.plain(value.state, depth + 1)
        return value

    def _tensor(self, args: Any) -> StoredTensor:
        if not isinstance(args, tuple) or len(args) < 4 or not isinstance(args[0], Persistent):
            raise self._damaged("a tensor without storage")
        place, offset, shape, stride = args[0].id, *args[1:4]
        if not isinstance(place, tuple) or len(place) != 5 or place[0] != "storage":
            raise self._damaged("a tensor without storage")
        kind, key = place[1], place[2]
        shape = shape.args[0] if isinstance(shape, Record) and str(shape.made_by) == "torch.Size" else shape
        if not isinstance(kind, Reference) or not all(_are_counts(part) for part in (shape, stride, (offset,))):
            raise self._damaged("a tensor without shape")
        dtype = _STORAGES.get(kind.name)
        if dtype is None and len(args) > 6 and isinstance(args[6], Reference):
            dtype = _DTYPES.get(str(args[6]))
        entry = self._entries.get(f"{self._root}data/{key}")
        if dtype is None or entry is None or len(shape) != len(stride):
            raise self._damaged(f"a tensor of {kind.name} without numbers")
        numel = math.prod(shape)
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True)) if numel else 0
        held = entry.file_size // dtype.itemsize
        if numel > held or last >= max(held, 1):
            raise self._damaged(f"a tensor of shape {shape} takes more bytes than are there")
        storage = Storage(self._path, self._offset + entry.header_offset, entry.file_size, entry.CRC)
        return StoredTensor(storage, dtype, tuple(shape), tuple(stride), offset)

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self._path}: damaged ({reason})")


def _are_counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 for value in values
    )


def _in_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose numbers lie in order."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _verify(stream: Any, storage: Storage) -> None:
    """torch writes checksums and does not look at them: a flipped bit would become a weight."""
    checksum, left = 0, storage.nbytes
    while left:
        chunk = stream.read(min(left, _CHUNK))
        if not chunk:
            raise UserError(f"{storage.path}: cut short")
        checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
    if checksum != storage.checksum:
        raise UserError(f"{storage.path}: damaged (a checksum differs)")
