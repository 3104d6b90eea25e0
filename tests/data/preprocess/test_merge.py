"""Merged pairs are what megatron-core's builder makes of them, however large they are."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data import indexed_stream, indexed_writer
from megatron_moe.data.indexed import bin_path, idx_path, open_indexed
from megatron_moe.data.indexed_stream import PairReader
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.preprocess import Preprocessing, preprocess
from megatron_moe.data.preprocess.merge import merge
from tests.data.chinese_text import write_jsonl
from tests.data.preprocess.helpers import megatron_pair, same_pair

# Documents of sequences; one is empty, as Megatron-LM's script writes for a text without a token.
PAIRS = [[[[1, 2, 3], [4]], [[5, 6]]], [[[7]]], [[], [[8, 9], [10], [11]], []]]


def write_all(folder: Path) -> list[Path]:
    for number, documents in enumerate(PAIRS):
        megatron_pair(folder / f"part{number}", documents, 100)
    return [folder / f"part{number}" for number in range(len(PAIRS))]


@pytest.mark.parametrize("block", [1, 2, 1 << 18])
def test_bytes_are_those_of_megatron_core(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexed_stream, "_BLOCK", block)
    prefixes = write_all(tmp_path)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(str(tmp_path / "theirs.idx"))
    merged = merge(prefixes, tmp_path / "new" / "ours")
    assert same_pair(tmp_path / "new" / "ours", tmp_path / "theirs")
    assert (merged.documents, merged.sequences) == (6, 7)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["ours.bin", "ours.idx", "ours.report.json"]
    with PairReader(tmp_path / "new" / "ours", "x") as pair:
        expected = [document for documents in PAIRS for document in documents]
        assert [[ids.tolist() for ids in pair.document(index)] for index in range(6)] == expected
        assert np.concatenate(list(pair.document_lengths())).tolist() == [4, 2, 1, 0, 4, 0]


def test_a_folder_stands_for_its_pairs(tmp_path: Path) -> None:
    prefixes = write_all(tmp_path / "in") if (tmp_path / "in").mkdir() is None else []
    merge([tmp_path / "in"], tmp_path / "folder")
    merge(prefixes, tmp_path / "named")
    assert same_pair(tmp_path / "folder", tmp_path / "named")


def sparse_pair(prefix: Path, lengths: list[int]) -> None:
    """A pair of zeros that take no room on the disk, but for the last token."""
    with bin_path(prefix).open("wb") as stream:
        stream.truncate(2 * sum(lengths))
        stream.seek(-2, 2)
        stream.write(b"\x07\x00")
    builder = IndexedDatasetBuilder(str(prefix.with_name("unused.bin")), dtype=np.uint16)
    builder.sequence_lengths = lengths
    builder.document_indices = list(range(len(lengths) + 1))
    builder.finalize(str(idx_path(prefix)))


def test_more_than_two_to_the_31_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 GB of tokens in sparse files: a peer's merge counted in 32 bits and wrote a broken index."""
    most = 2**31 - 1
    sparse_pair(tmp_path / "a", [most, 3])
    sparse_pair(tmp_path / "b", [5, most])
    sparse_pair(tmp_path / "c", [most, 2])

    def copy_sparsely(source: object, target: object, count: int) -> None:
        if count < 1 << 30:
            return real(source, target, count)
        source.seek(count - 2, 1)
        target.seek(count - 2, 1)
        return real(source, target, 2)

    real = indexed_writer.copy_bytes
    monkeypatch.setattr(indexed_writer, "copy_bytes", copy_sparsely)
    # A block a sequence, as with the many sequences that such a pair really has.
    monkeypatch.setattr(indexed_stream, "_BLOCK", 1)
    merge([tmp_path / name for name in "abc"], tmp_path / "all")
    lengths = [most, 3, 5, most, most, 2]
    starts = [sum(lengths[:place]) for place in range(6)]
    assert bin_path(tmp_path / "all").stat().st_size == 2 * sum(lengths) > 3 * 2**32
    dataset = IndexedDataset(str(tmp_path / "all"))
    assert dataset.sequence_lengths.tolist() == lengths
    assert dataset.index.sequence_pointers.tolist() == [2 * start for start in starts]
    assert [dataset[place].tolist() for place in (1, 5)] == [[0, 0, 7], [0, 7]]
    ours = open_indexed(tmp_path / "all")
    assert ours.num_tokens == sum(lengths)
    assert ours.tokens[[starts[1] + 2, starts[4] - 1, -1]].tolist() == [7, 7, 7]
    with PairReader(tmp_path / "all", "x") as pair:
        assert np.concatenate(list(pair.lengths())).tolist() == lengths
        assert pair.document(5)[0].tolist() == [0, 7]


def test_more_than_two_to_the_31_documents(tmp_path: Path) -> None:
    """The counters of a writer that has come so far; an index of that size would be 40 GB."""
    with IndexedWriter(tmp_path / "a", np.dtype(np.uint16)) as writer:
        before = 2**31 + 5
        writer.sequences = writer._marked = before
        writer.tokens = 2**40
        writer.add(np.arange(5, dtype=np.uint16), np.array([2, 3], np.int32))
        columns = []
        for column, kind in zip(writer._columns, ("<i4", "<i8", "<i8"), strict=True):
            column.seek(0)
            columns.append(np.frombuffer(column.read(), kind).tolist())
    assert columns == [[2, 3], [2**41, 2**41 + 4], [before + 1, before + 2]]
    header = np.frombuffer(idx_path(tmp_path / "a").read_bytes()[18:26], "<u8")
    assert header.tolist() == [before + 2]


def tokenized(folder: Path, name: str, vocab_size: int, **flags: object) -> Path:
    job = Preprocessing(data=DataConfig(tokenizer_type="NullTokenizer"), vocab_size=vocab_size, **flags)
    preprocess([write_jsonl(folder / f"{name}.jsonl", ["1 2", "3"])], folder / name, job)
    return folder / name


def test_pairs_that_do_not_go_together(tmp_path: Path) -> None:
    small = tokenized(tmp_path, "small", 100)
    large = tokenized(tmp_path, "large", 70_000)
    other = tokenized(tmp_path, "other", 101)
    (first, *_) = write_all(tmp_path)
    for paths, message in (
        ([small, large], r"merge .*large: stores int32, but .*small stores uint16; merge pairs of one tokenizer"),
        ([small, other], r"merge .*other: was made with another tokenizer than .*small \(tokenizer_fingerprint"),
        ([small, tmp_path / "none"], r"merge .*none: no file .*none\.idx"),
        ([small, small], r"merge .*small: is given twice"),
        ([tmp_path / "empty"], r"merge .*empty: no pair"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            merge(paths, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(UserError, match=r"--output-prefix .*small: is one of the pairs"):
        merge([small, first], small)
    # Without a report there is nothing to compare.
    merge([small, first], tmp_path / "out")


def test_shards_and_fields_find_their_report(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"my_text": "1 2", "title": "3"}\n{"my_text": "4", "title": "5"}\n')
    for name, vocab_size in (("x", 100), ("y", 101)):
        job = Preprocessing(
            data=DataConfig(tokenizer_type="NullTokenizer"), vocab_size=vocab_size, json_keys=("my_text", "title")
        )
        preprocess([source], tmp_path / name, job, shard_tokens=3)
    shards = [tmp_path / f"{name}_my_text-00000-of-00002" for name in "xy"]
    with pytest.raises(UserError, match="was made with another tokenizer"):
        merge(shards, tmp_path / "out")
    merge([tmp_path / f"x_my_text-0000{place}-of-00002" for place in range(2)], tmp_path / "out")
    assert open_indexed(tmp_path / "out").tokens.tolist() == [1, 2, 99, 4, 99]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bin cut", "was cut short"),
        ("bin longer", r"announces 12 bytes of tokens, but .*part0\.bin holds 14"),
        ("offset", "has offsets that its lengths do not give"),
        ("mark", "divides its sequences into documents wrongly"),
        ("first mark", "divides its sequences into documents wrongly"),
    ],
)
def test_damage_is_seen_on_the_way(tmp_path: Path, kind: str, message: str) -> None:
    prefixes = write_all(tmp_path)
    index, tokens = bytearray(idx_path(prefixes[0]).read_bytes()), bin_path(prefixes[0]).read_bytes()
    match kind:
        case "bin cut":
            tokens = tokens[:-2]
        case "bin longer":
            tokens += b"\0\0"
        case "offset":
            index[34 + 12 + 8] += 2
        case "mark":
            index[34 + 36 + 8] = 77
        case "first mark":
            index[34 + 36] = 1
    idx_path(prefixes[0]).write_bytes(index)
    bin_path(prefixes[0]).write_bytes(tokens)
    with pytest.raises(UserError, match=rf"^merge {re.escape(str(prefixes[0]))}: .*{message}") as caught:
        merge(prefixes, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_multimodal_pairs_are_refused(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16, multimodal=True)
    builder.add_item(torch.tensor([1, 2]), mode=1)
    builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    with pytest.raises(UserError, match="is a multimodal pair, which this tool does not merge"):
        merge([tmp_path / "a"], tmp_path / "out")
