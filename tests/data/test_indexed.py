"""The token files are megatron-core's: same bytes as its writer, same ids to its reader; damage is seen."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_moe.config.base import UserError
from megatron_moe.data.indexed import bin_path, idx_path, open_indexed, token_dtype
from megatron_moe.data.indexed_writer import IndexedWriter

DOCUMENTS = [[1, 2, 3], [7], list(range(50)), [65499, 0]]


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 65499) -> None:
    dtype = token_dtype(vocab_size)
    with IndexedWriter(prefix, dtype) as writer:
        for part in (documents[:1], documents[1:]):
            tokens = np.array([token for document in part for token in document], dtype=dtype)
            writer.add(tokens, np.array([len(document) for document in part], dtype=np.int32))


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 200_000])
def test_bytes_and_ids_are_those_of_megatron_core(tmp_path: Path, vocab_size: int) -> None:
    dtype = DType.optimal_dtype(vocab_size)
    assert token_dtype(vocab_size) == np.dtype(dtype)
    write(tmp_path / "ours", DOCUMENTS, vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()

    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[index].tolist() for index in range(len(dataset))] == DOCUMENTS
    ours = open_indexed(tmp_path / "ours")
    assert [ours.document(index).tolist() for index in range(len(ours.lengths))] == DOCUMENTS
    assert ours.num_tokens == 56


def write_part_and_fail(prefix: Path) -> None:
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(np.zeros(5, np.uint16), np.array([5], np.int32))
        writer.add(np.zeros(5, np.uint16), np.array([6], np.int32))


def test_a_failed_write_leaves_the_old_pair(tmp_path: Path) -> None:
    prefix = tmp_path / "deep" / "pair"
    write(prefix, DOCUMENTS)
    before = bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()
    with pytest.raises(ValueError, match="expected 6 tokens of uint16, got 5 of uint16"):
        write_part_and_fail(prefix)
    assert (bin_path(prefix).read_bytes(), idx_path(prefix).read_bytes()) == before
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["pair.bin", "pair.idx"]


def test_an_unfinished_pair_is_not_to_be_seen(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "pair", np.dtype(np.uint16)) as writer:
        writer.add(np.zeros(5, np.uint16), np.array([5], np.int32))
        assert not bin_path(tmp_path / "pair").exists()
        assert not idx_path(tmp_path / "pair").exists()
    assert open_indexed(tmp_path / "pair").num_tokens == 5


def damage(prefix: Path, kind: str) -> None:
    """Spoil one thing about a good pair."""
    index, tokens = idx_path(prefix), bin_path(prefix)
    match kind:
        case "no index":
            index.unlink()
        case "no tokens":
            tokens.unlink()
        case "index cut":
            index.write_bytes(index.read_bytes()[:-5])
        case "index cut in its header":
            index.write_bytes(index.read_bytes()[:20])
        case "tokens cut":
            tokens.write_bytes(tokens.read_bytes()[:-2])
        case "not an index":
            index.write_bytes(b"x" * 200)
        case "other dtype code":
            content = bytearray(index.read_bytes())
            content[17] = 77
            index.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no index", r"no file .*pair\.idx; write it with tools/preprocess_data\.py"),
        ("no tokens", r"no file .*pair\.bin; write it with tools/preprocess_data\.py"),
        ("index cut", r"pair\.idx holds \d+ bytes but announces \d+"),
        ("index cut in its header", "not a Megatron index"),
        ("tokens cut", r"pair\.bin holds 110 bytes but its index announces 112"),
        ("not an index", "not a Megatron index"),
        ("other dtype code", "dtype code 77"),
    ],
)
def test_a_damaged_pair_is_one_line(tmp_path: Path, kind: str, message: str) -> None:
    prefix = tmp_path / "pair"
    write(prefix, DOCUMENTS)
    damage(prefix, kind)
    with pytest.raises(UserError, match=rf"^--train-data-path {prefix}: .*{message}") as caught:
        open_indexed(prefix, "--train-data-path")
    assert "\n" not in str(caught.value)


def test_a_prefix_with_its_ending_is_explained(tmp_path: Path) -> None:
    write(tmp_path / "pair", DOCUMENTS)
    with pytest.raises(UserError, match=r"give the prefix without its ending: .*pair$"):
        open_indexed(tmp_path / "pair.bin")


def test_an_empty_pair_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "pair", [])
    with pytest.raises(UserError, match="holds no documents"):
        open_indexed(tmp_path / "pair")


def test_a_pair_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a blend of more files than a process may open."""

    def no_more_files(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer:
        writer.add(np.arange(4, dtype=np.uint16), np.array([4]))
    monkeypatch.setattr(np, "memmap", no_more_files)
    with pytest.raises(UserError, match=r"^--data-path .*/a: the pair cannot be read: Too many open files; raise it"):
        open_indexed(tmp_path / "a")
