"""Every record that can be read is read, from ranges as from the whole; the rest is reported with its place."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
