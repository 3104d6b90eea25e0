"""Damaged `.bin`/`.idx` pairs: refused with one line, or read right, by us and by all that training does with them."""

import itertools
import shutil
import struct
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.base import UserError
from megatron_moe.data.indexed import bin_path, idx_path, open_indexed
from megatron_moe.data.indexed_writer import IndexedWriter
from tests.helpers.fuzzing import EDGES, Guard, check_message, damaged, examples, in_child
from tests.helpers.tiny import tiny_run

LENGTHS = [3, 1, 40, 0, 2, 17]
HEADER = 34
VOCABULARY = 97


def write_pair(prefix: Path) -> tuple[bytes, bytes]:
    tokens = (np.arange(sum(LENGTHS)) % VOCABULARY).astype(np.uint16)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(tokens, np.array(LENGTHS, np.int32))
    return bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()


def columns() -> st.SearchStrategy[bytes]:
    """Indices of the right size whose columns hold anything."""
    small = st.integers(-3, 70)
    lengths = st.lists(st.one_of(small, st.sampled_from([2**31 - 1, -(2**31)])), max_size=8)

    def index(lengths: list[int], code: int, shift: list[int], marks: list[int], tail: int) -> bytes:
        ends = np.cumsum(lengths, dtype=np.int64) if lengths else np.empty(0, np.int64)
        offsets = (ends - np.array(lengths, np.int64)) * 2
        for place, value in enumerate(shift[: len(offsets)]):
            offsets[place] += value
        return b"".join(
            [
                struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(marks)),
                np.array(lengths, np.int32).tobytes(),
                offsets.tobytes(),
                np.array(marks, np.int64).tobytes(),
                b"\0" * tail,
            ]
        )

    whole = lengths.flatmap(
        lambda lengths: st.builds(
            index,
            st.just(lengths),
            st.sampled_from([8, 8, 8, 3, 4, 5, 6, 1]),
            st.one_of(st.just([]), st.lists(st.sampled_from([0, 0, 2, -2, 1, 2**62, -(2**62)]), max_size=8)),
            st.one_of(st.just(list(range(len(lengths) + 1))), st.lists(st.integers(-1, 9), max_size=9)),
            st.sampled_from([0, 0, 0, len(lengths)]),
        )
    )
    shifts = st.lists(st.sampled_from([0, 2, -2, 1, 2**40]), max_size=8)
    sound = st.builds(
        lambda lengths, shift: index(lengths, 8, shift, list(range(len(lengths) + 1)), 0),
        st.lists(st.integers(0, 30), min_size=1, max_size=8),
        st.one_of(st.just([]), shifts),
    )
    return st.one_of(sound, whole)


def headers(valid: bytes) -> st.SearchStrategy[bytes]:
    """A valid index that announces other counts."""
    count = st.one_of(st.integers(0, 10), st.sampled_from(EDGES))
    return st.builds(lambda s, d: valid[:18] + struct.pack("<QQ", s, d) + valid[HEADER:], count, count)


def test_damaged_pairs(tmp_path: Path) -> None:
    in_child(fuzz_pairs, tmp_path)


def fuzz_pairs(guard: Guard, folder: Path) -> None:
    tokens, index = write_pair(folder / "good")
    prefix = folder / "pair"
    train_on(folder / "good", folder / "cache")
    guard.limit_memory()
    accepted: list[bytes] = []
    bins = st.one_of(st.none(), st.none(), st.none(), st.just(tokens), damaged(tokens, header=len(tokens)))

    @examples(300)
    @given(st.one_of(damaged(index), columns(), headers(index)), bins)
    def check(index: bytes, tokens: bytes | None) -> None:
        guard.start(index)
        if tokens is None:
            tokens = b"\1\0" * fitting(index)
        bin_path(prefix).write_bytes(tokens)
        idx_path(prefix).write_bytes(index)
        try:
            source = open_indexed(prefix)
        except UserError as error:
            check_message(error)
            return
        accepted.append(index)
        assert sum(map(len, map(source.document, range(len(source.lengths))))) == source.num_tokens
        train_on(prefix, folder / "cache")

    check()
    # Otherwise nothing but refusals was seen.
    assert len(accepted) > 20, len(accepted)


def fitting(index: bytes) -> int:
    """Two-byte tokens that an index announces, as far as it can be read; kept small."""
    if len(index) < HEADER:
        return 1
    count = min(struct.unpack_from("<Q", index, 18)[0], (len(index) - HEADER) // 4)
    lengths = np.frombuffer(index, np.int32, count, HEADER)
    return int(np.clip(lengths.sum(dtype=np.int64), 0, 1000))


def train_on(prefix: Path, cache: Path) -> None:
    """Everything that training reads of it, megatron-core's reader and C++ index builder included."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_moe.data.datasets import build_datasets
    from megatron_moe.data.tokenizer.load import NullTokenizer

    ours, theirs = open_indexed(prefix), IndexedDataset(str(prefix))
    documents = [theirs[int(a) : int(b)] for a, b in itertools.pairwise(theirs.document_indices) if b > a]
    assert [np.concatenate(sequences).tolist() for sequences in documents] == [
        ours.document(place).tolist() for place in range(len(ours.lengths))
    ]
    run = tiny_run(seq_length=4, vocab_size=VOCABULARY + 1, train_data_path=(str(prefix),), data_cache_path=str(cache))
    try:
        stream = build_datasets(run, NullTokenizer(VOCABULARY + 1), train=True).train
    except UserError as error:
        check_message(error)
        return
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    assert stream is not None
    seen = [stream[place]["tokens"].tolist() for place in range(2 * stream.epoch_sizes[0])]
    assert all(0 <= token <= VOCABULARY for sample in seen for token in sample)
    assert len(seen) == 2 * ((ours.num_tokens - 1) // 4)
