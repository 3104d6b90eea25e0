"""The sample index of a token file: one epoch of megatron-core's GPTDataset, and its files in the cache folder.

An index lies in a folder of its own, which gets its name only when all of it is on the disk: a run that is killed
while it writes one leaves a folder `*.tmp` that nothing reads. The name is a hash of everything the index depends on.
"""

import errno
import hashlib
import json
import os
import pickle
import shutil
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.data.domains import ids_path
from megatron_moe.data.indexed import IndexedFile, bin_path, document_bounds, idx_path
from megatron_moe.data.safe_numpy import check_array_file
from megatron_moe.data.tokenizer.load import Tokenizer

# What numpy raises on a file that was cut short, emptied or overwritten.
_DAMAGE = (ValueError, EOFError, OSError, pickle.UnpicklingError)
# Names GPTDataset gives its three arrays (megatron/core/datasets/gpt_dataset.py,
# `_build_document_sample_shuffle_indices`). Where one is missing it would write all anew, on rank 0 only.
_ARRAYS = ("document_index", "sample_index", "shuffle_index")


class _DatasetTokenizer:
    """What GPTDataset reads of a tokenizer.

    No `pad`, so that megatron-core masks nothing by id (megatron/core/datasets/megatron_dataset.py, `__init__`).
    `unique_identifiers` would go into the names of the index's files; here the folder's name tells indices apart.
    """

    unique_identifiers: ClassVar[dict[str, str]] = {}

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eod = tokenizer.eod
        self.vocab_size = tokenizer.vocab_size


class _WholeDocuments(IndexedDataset):
    """megatron-core's reader with documents where it has sequences.

    GPTDataset shuffles sequences (megatron/core/datasets/gpt_dataset.py, `numel_low_level_dataset`): the sentences of a
    document that --split-sentences divided would be scattered over the epoch. What both of them read of an index
    (megatron/core/datasets/indexed_dataset.py, `_IndexReader`) is replaced here where a document has several, or none.
    """

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        """Called by the constructor, and once more after a copy was sent to another process."""
        super().initialize(*args, **kwargs)
        index = self.index
        marks, pointers, lengths = index.document_indices, index.sequence_pointers, index.sequence_lengths
        if len(marks) == len(lengths) + 1 and bool(np.all(np.diff(marks) == 1)):
            return
        itemsize = np.dtype(index.dtype).itemsize
        starts, ends = document_bounds(marks, pointers, int(pointers[-1]) + int(lengths[-1]) * itemsize)
        index.sequence_pointers = starts
        index.sequence_lengths = ((ends - starts) // itemsize).astype(np.int32)
        index.sequence_count = len(starts)
        index.document_indices = np.arange(len(starts) + 1, dtype=np.int64)


@dataclass(frozen=True)
class DomainOfFile:
    """One domain of a token file.

    Attributes:
        number: of the domain.
        name: its name.
        ids: [documents] the domain of every document of the file.
    """

    number: int
    name: str
    ids: npt.NDArray[np.uint16] = field(compare=False, repr=False)


@dataclass(frozen=True)
class FilePart:
    """The documents of a token file that belong to one split.

    Attributes:
        source: the checked pair.
        first, last: its documents [first, last).
        split: which split they are.
        domain: only those of this domain. None: all of them.
    """

    source: IndexedFile
    first: int
    last: int
    split: Split
    domain: DomainOfFile | None = None

    @property
    def documents(self) -> npt.NDArray[np.int32]:
        """Their numbers."""
        if self.domain is None:
            return np.arange(self.first, self.last, dtype=np.int32)
        found = np.flatnonzero(self.domain.ids[self.first : self.last] == self.domain.number)
        return (self.first + found).astype(np.int32)

    @property
    def num_tokens(self) -> int:
        """Tokens in these documents."""
        if self.domain is None:
            return int(self.source.lengths[self.first : self.last].sum(dtype="int64"))
        return int(self.source.lengths[self.documents].sum(dtype="int64"))

    @property
    def identity(self) -> str:
        """What tells this text from another, wherever the file lies."""
        name = Path(self.source.prefix).name
        total = len(self.source.lengths)
        whose = "" if self.domain is None else f"{self.domain.name} of "
        return f"{whose}{name}, documents {self.first} to {self.last} of {total}, {self.source.num_tokens} tokens"

    def index_folder(self, run: RunConfig, cache: Path) -> Path:
        """Where its index lies. The stamp keeps it from being used for files written anew under an old name."""
        paths = [path(self.source.prefix) for path in (bin_path, idx_path)]
        if self.domain is not None:
            paths.append(ids_path(self.source.prefix))
        stats = [path.stat() for path in paths]
        key: dict[str, Any] = {
            "prefix": self.source.prefix,
            "stamp": [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)],
            "documents": [self.first, self.last],
            "split": self.split.name,
            "seed": run.training.seed,
            "seq_length": run.model.seq_length,
        }
        if self.domain is not None:
            key["domain"] = self.domain.number
        return cache / hashlib.blake2b(json.dumps(key).encode(), digest_size=16).hexdigest()


def write_index(part: FilePart, run: RunConfig, tokenizer: Tokenizer, cache: Path) -> None:
    """Build a part's index unless it is there. One process does it.

    Raises:
        UserError: the cache folder cannot be written.
    """
    folder = part.index_folder(run, cache)
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.mkdir()
        _dataset(part, run, tokenizer, unfinished)
        for path in unfinished.iterdir():
            _sync(path)
        _publish(unfinished, folder)
    except OSError as error:
        raise UserError(f"--data-cache-path {cache}: cannot write there: {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def open_index(part: FilePart, run: RunConfig, tokenizer: Tokenizer, cache: Path) -> GPTDataset:
    """Samples of one epoch, in the shuffled order of an index that `write_index` wrote; memory-mapped.

    Raises:
        UserError: the index is damaged, cannot be read, or is not there, as on a node with another cache folder.
    """
    folder = part.index_folder(run, cache)
    if not folder.is_dir():
        raise UserError(
            f"--data-cache-path {cache}: rank 0 wrote the sample index of {part.source.prefix}, but this rank finds no "
            f"{folder.name} there; all nodes must share that folder and the token files"
        )
    try:
        for name in _ARRAYS:
            found = list(folder.glob(f"*{name}.npy"))
            if not found:
                raise FileNotFoundError(f"no {name}")
            for path in found:
                check_array_file(path)
        dataset = _dataset(part, run, tokenizer, folder)
        if len(dataset.shuffle_index) != len(dataset):
            raise ValueError(f"{len(dataset.shuffle_index)} places for {len(dataset)} samples")
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            cure = "; raise it with ulimit -n, or merge files" if error.errno == errno.EMFILE else ""
            raise UserError(f"{folder}: cannot be read: {error.strerror}{cure}") from error
        problem = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{folder}: damaged sample index of {part.source.prefix} ({problem}); delete the folder, the next run "
            "writes it again"
        ) from error
    return dataset


class SampleDomains:
    """The domain of every token of a sample: that of the document the token stands in.

    Args:
        epoch: samples of `open_index`.
        ids: [documents] domains of the token file's documents.
    """

    def __init__(self, epoch: GPTDataset, ids: npt.NDArray[np.uint16]) -> None:
        self._epoch = epoch
        self._ids = ids

    def __getitem__(self, sample: int) -> npt.NDArray[np.int64]:
        """[S], put together as GPTDataset does (`_query_document_sample_shuffle_indices`)."""
        epoch = self._epoch
        place = epoch.shuffle_index[sample]
        (first, skipped), (last, _) = epoch.sample_index[place], epoch.sample_index[place + 1]
        documents = epoch.document_index[first : last + 1]
        lengths = epoch.dataset.sequence_lengths[documents].astype(np.int64)
        lengths[0] -= skipped
        return np.repeat(self._ids[documents].astype(np.int64), lengths)[: epoch.config.sequence_length]


def _dataset(part: FilePart, run: RunConfig, tokenizer: Tokenizer, folder: Path) -> GPTDataset:
    config = GPTDatasetConfig(
        random_seed=run.training.seed,
        sequence_length=run.model.seq_length,
        blend=([part.source.prefix], None),
        split="1",
        path_to_cache=str(folder),
        tokenizer=_stand_in(tokenizer),
        reset_position_ids=run.data.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=run.data.eod_mask_loss,
        create_attention_mask=False,
    )
    tokens = _WholeDocuments(part.source.prefix)
    # No number of samples: exactly one epoch (`_get_num_epochs`).
    return GPTDataset(tokens, part.source.prefix, part.documents, None, part.split, config)


def _stand_in(tokenizer: Tokenizer) -> Any:
    return _DatasetTokenizer(tokenizer)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        unfinished.rename(folder)
    except OSError:
        # Another run was faster; its index is the same.
        if not folder.exists():
            raise
