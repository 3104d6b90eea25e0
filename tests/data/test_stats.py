"""Unigram figures against numbers worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.config.base import UserError
from megatron_moe.data.indexed import open_indexed
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.stats import check_token_range, token_counts, unigram_cross_entropy, unigram_entropy


def write(prefix: Path, tokens: list[int]) -> str:
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.array(tokens, np.uint16), np.array([len(tokens)], np.int32))
    return str(prefix)


def test_by_hand(tmp_path: Path) -> None:
    train = write(tmp_path / "train", [0, 0, 0, 1])
    heldout = write(tmp_path / "heldout", [0, 1, 2, 2])
    assert token_counts(train, 4).tolist() == [3, 1, 0, 0]
    assert unigram_entropy(heldout, 4) == pytest.approx(0.5 * math.log(4) + 0.5 * math.log(2))
    # Smoothed training counts are 4, 2, 1, 1 of 8.
    expected = -(math.log(4 / 8) + math.log(2 / 8) + 2 * math.log(1 / 8)) / 4
    assert unigram_cross_entropy(train, heldout, 4) == pytest.approx(expected)


def test_an_id_outside_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    prefix = write(tmp_path / "pair", [0, 5, 1])
    message = "holds token id 5, but the vocabulary has 5; it was made with another tokenizer"
    with pytest.raises(UserError, match=message):
        token_counts(prefix, 5)
    with pytest.raises(UserError, match=message):
        check_token_range(open_indexed(prefix), 5)
    check_token_range(open_indexed(prefix), 6)
