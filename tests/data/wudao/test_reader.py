"""Every record that can be read is read, from ranges as from the whole; the rest is reported with its place."""

import gzip
import itertools
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megatron_moe.data.wudao.objects import Fault
from megatron_moe.data.wudao.reader import Piece, PieceReader, ReadOptions, cut_objects
from megatron_moe.data.wudao.source import inspect_source

OPTIONS = ReadOptions()
# Texts that look like the places where records begin and end.
LOOKALIKES = ['},{"', '},\n{"id":7', '"', "\\", '\\"},{', "}]", '[{"id":1}]', "{", "\n", '{"id":', '"}', "中文。", ""]
TEXTS = st.lists(st.sampled_from(LOOKALIKES) | st.text(max_size=5), max_size=4).map("".join)
NESTED = st.recursive(
    TEXTS | st.integers(-5, 5) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["id", "content", "x"]), inner),
    max_leaves=6,
)
RECORDS = st.lists(
    st.fixed_dictionaries({"id": st.integers(0, 9), "content": TEXTS}, optional={"title": TEXTS, "more": NESTED}),
    max_size=12,
)


def read(path: Path, options: ReadOptions = OPTIONS, start: int = 0, end: int | None = None) -> tuple[list[Any], list]:
    faults: list[Fault] = []
    piece = Piece(inspect_source(path), start, end)
    batches = list(PieceReader(piece, options, faults.append))
    return [(d.text, d.title, d.meta) for batch in batches for d in batch.documents], faults


def as_read(record: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    meta = {name: value for name, value in record.items() if name not in ("content", "title")}
    return record["content"], record.get("title", ""), meta


def array(records: list[Any], separator: str = ",", indent: int | None = None) -> bytes:
    return f"[{separator.join(json.dumps(r, ensure_ascii=False, indent=indent) for r in records)}]".encode()


def lines(records: list[Any]) -> bytes:
    return b"".join(orjson.dumps(record) + b"\n" for record in records)


SHAPES: dict[str, Callable[[list[Any]], bytes]] = {
    "compact": array,
    "a line each": lambda records: array(records, ",\n"),
    "pretty": lambda records: array(records, ",\n", indent=2),
    "wrapper": lambda records: b'{"RECORDS": ' + array(records) + b"}\n",
    "byte order mark": lambda records: b"\xef\xbb\xbf" + array(records),
    "lines": lines,
    "objects": lambda records: b"\n".join(json.dumps(record, indent=1).encode() for record in records),
}


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=25, deadline=None)
@given(records=RECORDS, cuts=st.integers(1, 6), chunk=st.integers(1, 60))
def test_ranges_give_the_records_of_the_whole(
    shape: str, records: list[Any], cuts: int, chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = SHAPES[shape](records)
    path = tmp_path_factory.getbasetemp() / f"{shape.replace(' ', '-')}.json"
    path.write_bytes(content)
    source = inspect_source(path)
    documents, faults = read(path)
    if not content:
        assert [fault.reason for fault in faults] == ["empty file"]
        return
    assert documents == [as_read(record) for record in records]
    assert not faults
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_moe.data.wudao.objects._CHUNK", chunk)
        patch.setattr("megatron_moe.data.wudao.lines._CHUNK", chunk)
        assert read(path) == (documents, [])
        if source.form == "lines":
            bounds = sorted({0, *range(0, len(content), max(1, len(content) // cuts)), len(content)})
        else:
            bounds = cut_objects(source, len(content), cuts, OPTIONS, id)
            assert len(bounds) == cuts + 1
        pieces = [read(path, start=start, end=end) for start, end in itertools.pairwise(bounds)]
    assert [document for part, _ in pieces for document in part] == documents
    assert not [fault for _, part in pieces for fault in part]


@settings(max_examples=80, deadline=None)
@given(
    records=st.lists(RECORDS.filter(bool).map(lambda some: some[0]), min_size=2, max_size=8),
    shape=st.sampled_from(["compact", "a line each", "lines"]),
    damage=st.lists(st.tuples(st.floats(0, 1), st.sampled_from([b"", b"\xff", b"\0", b'"', b"}", b"{"])), max_size=3),
    cuts=st.integers(1, 5),
)
def test_ranges_of_a_damaged_file_give_the_records_of_the_whole(
    records: list[Any],
    shape: str,
    damage: list[tuple[float, bytes]],
    cuts: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    content = SHAPES[shape](records)
    for share, junk in damage:
        place = int(share * len(content))
        content = content[:place] + junk + content[place + 1 :]
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(content or b" ")
    source = inspect_source(path)
    documents, faults = read(path)
    if source.form == "lines":
        bounds = [len(content) * number // cuts for number in range(cuts + 1)]
    elif source.form == "objects":
        bounds = cut_objects(source, len(content), cuts, OPTIONS, id)
    else:
        return
    pieces = [read(path, start=start, end=end) for start, end in itertools.pairwise(bounds)]
    assert [document for part, _ in pieces for document in part] == documents
    lost = [fault.offset for fault in faults if not fault.kept]
    assert [fault.offset for _, part in pieces for fault in part if not fault.kept] == lost
    # A damaged byte costs no more than the records it touches or joins.
    if not damage:
        assert len(documents) == len(records)


def faulty(content: bytes, tmp_path: Path, name: str = "part.json") -> tuple[list[str], list[tuple[str, int, bool]]]:
    """Texts that are read, and of each fault its reason, offset, and whether the record was kept."""
    path = tmp_path / name
    path.write_bytes(content)
    documents, faults = read(path)
    return [text for text, _, _ in documents], [(fault.reason, fault.offset, fault.kept) for fault in faults]


ONE, TWO = b'{"id":1,"content":"one"}', b'{"id":2,"content":"two"}'


@pytest.mark.parametrize(
    ("content", "texts", "faults"),
    [
        (b"[" + ONE + b',{"id":2,"content":"tw', ["one"], [("not JSON", 26, False)]),
        (b"[" + ONE + b",\n" + TWO, ["one", "two"], [("damaged file", 51, True)]),
        (b'[{"id":1,"content":"on},\n' + TWO + b"]", ["two"], [("not JSON", 1, False)]),
        (b'[{"id":1,"content":"one"},\n{"id":5,"content":"' + TWO + b"]", ["one", "two"], [("not JSON", 27, False)]),
        (b"[" + ONE + b"\0\0\0," + TWO + b"]", ["one", "two"], [("not a record", 25, False)]),
        (b'[{"content":"\xff"},' + TWO + b"]", ["�", "two"], [("mended", 1, True)]),
        (b'[{"content":"\\ud83d"},' + TWO + b"]", ["�", "two"], [("mended", 1, True)]),
        (b'[{"content":"\\ud83d\\ude00 a\nb"}]', ["😀 a\nb"], [("mended", 1, True)]),
        (b'[{"content":5},' + TWO + b"]", ["two"], [("wrong type", 1, False)]),
        (b'[{"content":null},' + TWO + b"]", ["two"], [("wrong type", 1, False)]),
        (b'[{"content":"one","title":7},' + TWO + b"]", ["one", "two"], [("wrong type", 1, True)]),
        (b'[{"content":"one","title":null}]', ["one"], []),
        (b'[{"text":"one"},' + TWO + b"]", ["two"], [("no text", 1, False)]),
        (b'["one",' + TWO + b"]", ["two"], [("not a record", 1, False)]),
        (b'[{"content":"a\\u0000b"}]', ["a\0b"], []),
        (b'[{"content":"one"}' + TWO + b"]", ["one", "two"], []),
        (b"[" + ONE + b"][" + TWO + b"]\n", ["one", "two"], []),
        (b"", [], [("empty file", 0, False)]),
        (b"\xef\xbb\xbf \n", [], [("empty file", 0, False)]),
        (b"[]", [], []),
        (b"hello", [], [("not a record", 0, False)]),
        (b'[{"content":"one","n":NaN},' + TWO + b"]", ["one", "two"], [("mended", 1, True)]),
        (b'[{"content":"one","n":' + b"[" * 200_000 + b"]}," + TWO + b"]", ["two"], [("not JSON", 1, False)]),
    ],
)
def test_a_fault_in_an_array_costs_itself_alone(
    content: bytes, texts: list[str], faults: list[tuple[str, int, bool]], tmp_path: Path
) -> None:
    assert faulty(content, tmp_path) == (texts, faults)


@pytest.mark.parametrize(
    ("content", "texts", "faults"),
    [
        (ONE + b"\n\n" + TWO, ["one", "two"], []),
        (b"\xef\xbb\xbf" + ONE + b"\r\n" + TWO + b"\r\n", ["one", "two"], []),
        (b'{"content":"on\n' + TWO + b"\n", ["two"], [("not JSON", 0, False)]),
        (b'{"content":"\xff\xfe"}\n' + TWO + b"\n", ["��", "two"], [("mended", 0, True)]),
        (b'5\n"text"\n' + TWO + b"\n", ["two"], [("not a record", 0, False), ("not a record", 2, False)]),
        (ONE + TWO + b"\n" + b"xx" + ONE + b"\n", ["one", "two", "one"], [("not a record", 49, False)]),
    ],
)
def test_a_fault_in_a_line_costs_itself_alone(
    content: bytes, texts: list[str], faults: list[tuple[str, int, bool]], tmp_path: Path
) -> None:
    assert faulty(content, tmp_path, "part.jsonl") == (texts, faults)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("shape", ["a line each", "lines"])
def test_a_cut_compressed_file_gives_all_records_before_the_cut(tmp_path: Path, shape: str, ending: str) -> None:
    # Texts that do not compress, so that the cut is near the end.
    records = [{"id": number, "content": os.urandom(30).hex()} for number in range(2_000)]
    plain = SHAPES[shape](records)
    packed = gzip.compress(plain) if ending == ".gz" else zstandard.compress(plain)
    path = tmp_path / f"part.json{ending}"
    path.write_bytes(packed[: len(packed) * 3 // 4])
    documents, faults = read(path)
    assert documents == [as_read(record) for record in records[: len(documents)]]
    # zstd gives whole blocks of 128 KiB only, which is all of this one.
    assert len(documents) > (1_450 if ending == ".gz" else -1)
    # The place is where the text ends that can be read, not where reading began.
    unpacked = zlib.decompressobj(31) if ending == ".gz" else zstandard.ZstdDecompressor().decompressobj()
    before = unpacked.decompress(path.read_bytes())
    assert [fault.offset for fault in faults if fault.reason == "damaged file"] == [len(before)]
    path.write_bytes(packed)
    assert read(path) == ([as_read(record) for record in records], [])


def test_the_kind_of_file_is_told_by_its_content(tmp_path: Path) -> None:
    records = [{"id": number, "content": f"text {number}"} for number in range(9)]
    expected = [as_read(record) for record in records]
    for name, content in {
        "array.jsonl": array(records),
        "lines.json": lines(records),
        "plain.json.gz": array(records),
        "packed.json": gzip.compress(array(records)),
        "no-ending": zstandard.compress(lines(records)),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == (expected, []), name


def test_a_long_record_is_left_out_and_the_next_ones_are_read(tmp_path: Path) -> None:
    options = ReadOptions(longest_record=10_000)
    for content in (b"x" * 10_001, b"x" * 9_000_000, b'},{\\"' * 5_000):
        record = b'{"id":7,"content":"' + content + b'"}'
        for whole, name in (
            (b"[" + ONE + b"," + record + b"," + TWO + b"]", "a.json"),
            (b"\n".join([ONE, record, TWO]), "b.jsonl"),
        ):
            path = tmp_path / name
            path.write_bytes(whole)
            documents, faults = read(path, options)
            assert [text for text, _, _ in documents] == ["one", "two"]
            assert [(fault.reason, fault.offset) for fault in faults] == [("record too long", whole.index(record))]
            assert faults[0].size in (len(record), len(record) + 1)


def test_rows_of_parquet_are_read_by_row_groups(tmp_path: Path) -> None:
    records = [{"id": number, "title": f"title {number}", "content": f"text {number}"} for number in range(1_000)]
    path = tmp_path / "part.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=300)
    expected = [as_read(record) for record in records]
    assert read(path) == (expected, [])
    assert read(path, start=0, end=2)[0] + read(path, start=2, end=4)[0] == expected
    assert read(path, ReadOptions(text_key="text"))[1][0].reason == "no text"


def test_a_damaged_row_group_costs_itself_alone(tmp_path: Path) -> None:
    records = [{"content": os.urandom(50).hex()} for _ in range(1_000)]
    path = tmp_path / "part.parquet"
    parquet.write_table(
        pyarrow.Table.from_pylist(records), path, row_group_size=250, use_dictionary=False, compression="zstd"
    )
    with parquet.ParquetFile(path) as file:
        place = file.metadata.row_group(1).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[place + 60 : place + 4_000] = os.urandom(3_940)
    path.write_bytes(content)
    documents, faults = read(path)
    assert [text for text, _, _ in documents] == [r["content"] for r in records[:250] + records[500:]]
    assert [(fault.reason, fault.offset, fault.size) for fault in faults] == [("damaged file", 250, 250)]
    path.write_bytes(content[:-40])
    assert [fault.reason for fault in read(path)[1]] == ["damaged file"]


def test_bytes_in_parquet_that_are_not_utf8_are_mended(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    raw = pyarrow.array([b"one", b"t\xffo"]).view(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 2, raw.buffers())
    parquet.write_table(pyarrow.table({"content": text}), path)
    documents, faults = read(path)
    assert [text for text, _, _ in documents] == ["one", "t�o"]
    assert [(fault.reason, fault.offset, fault.kept) for fault in faults] == [("mended", 1, True)]


READ_ALL = """
import resource, sys
from pathlib import Path
from megatron_moe.data.wudao.reader import Piece, PieceReader, ReadOptions
from megatron_moe.data.wudao.source import inspect_source
# Reading a first small file loads everything that takes memory once.
counts = []
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader = PieceReader(Piece(inspect_source(Path(path)), 0), ReadOptions(), lambda fault: None)
    counts.append(sum(len(batch.documents) for batch in reader))
print(*counts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, ending: str) -> None:
    record = orjson.dumps({"id": 1, "content": "今天天气很好，我们一起去公园散步。" * 60})
    # And a record of 100 MB, which no reader may hold.
    long = b'{"id":2,"content":"' + b"x" * 100_000_000 + b'"}'
    for name, content in (("small.json", [record] * 10), ("large.json", [record] * 10_000 + [long] + [record])):
        whole = b"[" + b",\n".join(content) + b"]"
        (tmp_path / f"{name}{ending}").write_bytes(gzip.compress(whole, 1) if ending else whole)
    names = [str(tmp_path / f"{name}{ending}") for name in ("small.json", "large.json")]
    run = subprocess.run([sys.executable, "-c", READ_ALL, *names], capture_output=True, text=True, check=True)
    small, large, kilobytes = map(int, run.stdout.split())
    assert (small, large) == (10, 10_001)
    # The limit of a record (16 MiB) a few times, of 131 MB.
    assert kilobytes < 80_000
