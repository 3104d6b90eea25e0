"""The text a tokenizer learns from and is judged by: a sample of sentences, and documents held out, in bounded memory.

Every sentence has a place (file, number in it) and from it a key that looks random; the sentences with the smallest
keys are the sample. So it is a uniform one, the same for the same seed, whichever process reads which file first.
Documents are held out by their content: a text that stands twice in the corpus is never on both sides.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.documents import check_text, parse_object, plain_line
from megatron_moe.data.files import base_suffix, iterate_lines, open_stream, require_package
from megatron_moe.data.tokenizer.sentences import trainer_lines

try:
    from orjson import loads as _fast_loads
except ImportError:
    # It is only faster: what it does not take is read by `parse_object` in any case.
    def _fast_loads(line: bytes | bytearray | memoryview | str, /) -> Any:
        raise ValueError


# Of the held-out documents so many are kept: enough that chars/token of each kind of text stands to a few per mille.
HELDOUT_DOCUMENTS = 10_000
_PARQUET_ROWS = 1024
_FLUSH_LINES = 1 << 14
# A place is the file's number above so many bits for the place in the file.
_PLACE_BITS = 40

_Array = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What to read, and how much of it to keep.

    Attributes:
        json_key: the field or column that holds the text.
        group_key: the field or column that says what kind of text it is, where there is one; otherwise the name of
            the file does.
        sentences: how many sentences to keep at most.
        heldout_every: one document in so many is held out; 0 for none.
        seed: another one gives another sample.
    """

    json_key: str = "text"
    group_key: str = "dataType"
    sentences: int = 2_000_000
    heldout_every: int = 50
    seed: int = 1234


class SmallestKeys[Item]:
    """Keeps the items with the `size` smallest keys of all that were added, in any order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._keys: list[_Array] = []
        self._places: list[_Array] = []
        self._items: list[Item] = []
        # An item with a larger key is surely not among the smallest.
        self.limit = np.uint64(2**64 - 1)

    def add(self, keys: _Array, places: _Array, items: Sequence[Item]) -> None:
        """Add items; each has its own key."""
        chosen = np.flatnonzero(keys <= self.limit)
        if len(chosen) == len(items):
            self._items += items
        else:
            self._items += [items[index] for index in chosen.tolist()]
        self._keys.append(keys[chosen])
        self._places.append(places[chosen])
        if len(self._items) > self.size + self.size // 4 + 1024:
            self._shrink()

    def lower_limit(self, limit: np.uint64) -> None:
        """Take no larger keys from now on: as many as needed below it are known elsewhere."""
        self.limit = min(self.limit, limit)

    def merge(self, other: "SmallestKeys[Item]") -> None:
        """Add all that another one kept."""
        keys, places = other._joined()
        self.add(keys, places, other._items)

    def in_order(self) -> list[Item]:
        """The kept items by their places."""
        if len(self._items) > self.size:
            self._shrink()
        _, places = self._joined()
        return [self._items[index] for index in np.argsort(places).tolist()]

    def _joined(self) -> tuple[_Array, _Array]:
        empty = np.empty(0, np.uint64)
        return np.concatenate([empty, *self._keys]), np.concatenate([empty, *self._places])

    def _shrink(self) -> None:
        keys, places = self._joined()
        chosen = np.argpartition(keys, self.size - 1)[: self.size]
        self._items = [self._items[index] for index in chosen.tolist()]
        self._keys, self._places = [keys[chosen]], [places[chosen]]
        self.limit = keys[chosen].max()


def place_keys(places: _Array, seed: int) -> _Array:
    """A key for every place: splitmix64, which gives different keys to different places.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    state = places + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@dataclass(kw_only=True)
class Sample:
    """What was read from some files, and what was kept of it.

    Attributes:
        documents, characters: read.
        heldout_documents: documents of them that were held out, however many were kept.
        sentences: lines offered for the sample.
        cut_lines: lines over the trainer's limit, cut into several.
        kept: the sample.
        heldout: kept held-out documents, as (kind of text, text).
    """

    documents: int = 0
    characters: int = 0
    heldout_documents: int = 0
    sentences: int = 0
    cut_lines: int = 0
    kept: SmallestKeys[str]
    heldout: SmallestKeys[tuple[str, str]] = field(default_factory=lambda: SmallestKeys(HELDOUT_DOCUMENTS))

    def merge(self, other: "Sample") -> None:
        """Add what another process read."""
        for name in ("documents", "characters", "heldout_documents", "sentences", "cut_lines"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.kept.merge(other.kept)
        self.heldout.merge(other.heldout)


def read_sample(
    path: Path,
    number: int,
    options: SampleOptions,
    limit: np.uint64 | None = None,
    progress: Callable[[int], object] | None = None,
) -> Sample:
    """Sample one file.

    Args:
        path: the file.
        number: its place among all inputs.
        options: what to keep.
        limit: no sentence with a larger key is wanted, because other files have enough below it.
        progress: told how many more bytes of the file were read.

    Raises:
        UserError: the file cannot be read; see `read_texts`.
    """
    sample = Sample(kept=SmallestKeys(options.sentences))
    if limit is not None:
        sample.kept.lower_limit(limit)
    first = number << _PLACE_BITS
    pending: list[str] = []
    for text, group in read_texts(path, options, progress):
        document = first + sample.documents
        sample.documents += 1
        sample.characters += len(text)
        if options.heldout_every and is_held_out(text, options.heldout_every):
            sample.heldout_documents += 1
            place = np.array([document], np.uint64)
            sample.heldout.add(place_keys(place, options.seed), place, [(group, text)])
            continue
        lines, cut = trainer_lines(text)
        sample.cut_lines += cut
        pending += lines
        if len(pending) >= _FLUSH_LINES:
            _offer(sample, pending, first, options.seed)
            pending = []
    _offer(sample, pending, first, options.seed)
    return sample


def _offer(sample: Sample, lines: list[str], first: int, seed: int) -> None:
    places = np.arange(len(lines), dtype=np.uint64) + np.uint64(first + sample.sentences)
    sample.sentences += len(lines)
    sample.kept.add(place_keys(places, seed), places, lines)


def sample_documents(files: Sequence[Path], options: SampleOptions) -> list[tuple[str, str]]:
    """As many documents of some files as are kept of held-out ones, chosen in the same way: (kind of text, text)."""
    kept = SmallestKeys[tuple[str, str]](HELDOUT_DOCUMENTS)
    for number, path in enumerate(files):
        for count, (text, group) in enumerate(read_texts(path, options)):
            place = np.array([(number << _PLACE_BITS) + count], np.uint64)
            kept.add(place_keys(place, options.seed), place, [(group, text)])
    return kept.in_order()


def is_held_out(text: str, every: int) -> bool:
    """Whether a document is held out when one in `every` is; decided by its text alone."""
    return zlib.crc32(text.encode("utf-8")) % every == 0


def read_texts(
    path: Path, options: SampleOptions, progress: Callable[[int], object] | None = None
) -> Iterator[tuple[str, str]]:
    """Every document of a file and what kind of text it is.

    Raises:
        UserError: the file is damaged, or a document is not as it should be; names file and line.
    """
    suffix = base_suffix(path)
    named = path.name.split(".")[0]
    if suffix == ".parquet":
        yield from _parquet_texts(path, options, named, progress)
        return
    with open_stream(path) as (stream, position):
        reported = 0
        for number, line in enumerate(iterate_lines(stream, path), start=1):
            if progress is not None and number % 1000 == 0:
                progress(position() - reported)
                reported = position()
            if suffix == ".txt":
                yield plain_line(line, path, number), named
                continue
            yield _record(line, options, path, number, named)
        if progress is not None:
            progress(position() - reported)


def _record(line: bytes, options: SampleOptions, path: Path, number: int, named: str) -> tuple[str, str]:
    try:
        # Valid UTF-8 and valid Unicode are certain where this succeeds.
        entry = _fast_loads(line)
        text = entry[options.json_key]
        if type(text) is str:
            group = entry.get(options.group_key)
            return text, group if type(group) is str and group else named
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    entry = parse_object(line, f"the field {options.json_key!r}", path, number)
    return _fields(entry, options, f"{path} line {number}", named)


def _fields(entry: dict[str, Any], options: SampleOptions, where: str, named: str) -> tuple[str, str]:
    if options.json_key not in entry:
        fields = ", ".join(sorted(map(repr, entry))) or "none"
        raise UserError(f"{where}: no field {options.json_key!r} (--json-key); fields here: {fields}")
    text = check_text(entry[options.json_key], options.json_key, where)
    group = entry.get(options.group_key)
    return text, group if isinstance(group, str) and group else named


def _parquet_texts(
    path: Path, options: SampleOptions, named: str, progress: Callable[[int], object] | None
) -> Iterator[tuple[str, str]]:
    require_package("pyarrow", path)
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if options.json_key not in names:
                columns = ", ".join(map(repr, names))
                raise UserError(f"{path}: no column {options.json_key!r} (--json-key); columns here: {columns}")
            wanted = [name for name in (options.json_key, options.group_key) if name in names]
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=wanted):
                for entry in batch.to_pylist():
                    yield _fields(entry, options, f"{path} row {row}", named)
                    row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not Parquet, or damaged: {str(error).splitlines()[0]}") from error
    if progress is not None:
        progress(path.stat().st_size)
