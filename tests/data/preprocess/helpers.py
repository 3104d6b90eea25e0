"""What the tests of preprocessing share: megatron-core's own writer as the reference, and inputs of every kind."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow
import torch
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from pyarrow import parquet

from megatron_moe.data.indexed import bin_path, idx_path
from megatron_moe.data.tokenizer.kinds.protocol import IdBatch, join_ids


class LetterTokenizer:
    """An id a character, none for a space; small enough to compute by hand."""

    vocab_size = 1000
    eod = 999
    fingerprint = "letters"

    def encode(self, text: str) -> list[int]:
        return [ord(character) % 997 for character in text if character != " "]

    def encode_batch(self, texts: Sequence[str]) -> IdBatch:
        return join_ids([self.encode(text) for text in texts])


def megatron_pair(prefix: Path, documents: Sequence[Sequence[Sequence[int]]], vocab_size: int) -> None:
    """What megatron-core's builder writes for documents of sequences."""
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=DType.optimal_dtype(vocab_size))
    for sequences in documents:
        ids = [index for sequence in sequences for index in sequence]
        builder.add_document(torch.tensor(ids), [len(sequence) for sequence in sequences])
    builder.finalize(str(idx_path(prefix)))


def same_pair(first: Path, second: Path) -> bool:
    return all(path(first).read_bytes() == path(second).read_bytes() for path in (bin_path, idx_path))


def ids(values: Sequence[int]) -> npt.NDArray[np.uint16]:
    return np.array(values, np.uint16)


def write_records(path: Path, records: Sequence[dict[str, str]]) -> Path:
    """A file of the kind its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        columns = {key: [record[key] for record in records] for key in records[0]}
        parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
        return path
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if ".txt" in path.suffixes:
        content = "".join(record["text"] + "\n" for record in records).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return path
