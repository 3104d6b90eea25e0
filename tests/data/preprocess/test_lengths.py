"""Lengths and packing, against counting by hand."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import ConfigError
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.preprocess import lengths as module
from megatron_moe.data.preprocess.lengths import best_fit_rows, describe, measure


def write(prefix: Path, lengths: list[int], documents: list[int] | None = None) -> Path:
    counts = None if documents is None else np.array(documents, np.int32)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.zeros(sum(lengths), np.uint16), np.array(lengths, np.int32), counts)
    return prefix


def rows_by_hand(lengths: list[int], size: int) -> int:
    rows: list[int] = []
    pieces = [size] * sum(length // size for length in lengths) + [length % size for length in lengths]
    for piece in sorted(filter(None, pieces), reverse=True):
        fitting = [row for row in rows if row >= piece]
        if fitting:
            rows.remove(min(fitting))
            rows.append(min(fitting) - piece)
        else:
            rows.append(size - piece)
    return len(rows)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 20))
def test_best_fit_is_as_by_hand(lengths: list[int], size: int) -> None:
    values, counts = np.unique(np.array(lengths, np.int64), return_counts=True)
    assert best_fit_rows(values, counts, size) == rows_by_hand(lengths, size)


def test_lengths_and_packing(tmp_path: Path) -> None:
    # Documents of 10, 5, 3, 22 and 8 tokens.
    prefix = write(tmp_path / "a", [4, 6, 5, 3, 22, 1, 7], [2, 1, 1, 1, 2])
    found = measure(prefix, seq_length=10)
    assert found.values.tolist() == [3, 5, 8, 10, 22]
    assert (found.documents, found.tokens) == (5, 48)
    assert [found.quantile(share) for share in (0.01, 0.2, 0.21, 0.5, 0.99)] == [3, 3, 5, 8, 22]
    packing = found.packing
    assert packing is not None
    assert (packing.samples, packing.tokens_left_over) == (4, 8)
    # 18-40 and nothing else crosses a multiple of ten: 0-10, 10-15, 15-18, 18-40, 40-48.
    assert packing.documents_cut == 1
    assert packing.padding_share == pytest.approx(1 - (10 + 5 + 3 + 10 + 8) / 50)
    # 10, 10, 10, 8 + 2, 5 + 3
    assert packing.rows == 5
    assert packing.row_fill == pytest.approx(48 / 50)
    page = describe(found)
    assert "5 documents, 48 tokens, 9.6 tokens a document" in page
    assert "min 3  1% 3  5% 3  25% 5  50% 8  75% 10  95% 22  99% 22  max 22" in page
    rows = [line.split()[1:3] for line in page.splitlines() if line.startswith("  to")]
    assert rows == [["4", "1"], ["8", "2"], ["16", "1"], ["32", "1"]]


def test_long_documents_are_counted_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COUNTED", 8)
    found = measure(write(tmp_path / "a", [3, 8, 7, 100, 8, 0]))
    assert found.values.tolist() == [0, 3, 7, 8, 100]
    assert found.counts.tolist() == [1, 1, 1, 2, 1]
    assert found.packing is None


def test_no_sequence_length_of_zero(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--seq-length 0: must be at least 1"):
        measure(write(tmp_path / "a", [1]), 0)
