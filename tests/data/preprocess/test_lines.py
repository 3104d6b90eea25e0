"""Pieces of a file hold every line once, wherever they are cut."""

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import UserError
from megatron_moe.data.preprocess import lines as module
from megatron_moe.data.preprocess.lines import LineReader, count_lines

LINES = st.lists(st.text("ab", max_size=9), max_size=12)


def read(reader: LineReader, start: int, stop: int) -> list[tuple[int, bytes]]:
    reader.skip_to(start)
    return [(first + place, line) for first, batch in reader.batches(stop) for place, line in enumerate(batch)]


@settings(max_examples=300)
@given(lines=LINES, piece=st.integers(1, 20), block=st.integers(1, 30), ended=st.booleans(), seeks=st.booleans())
def test_every_line_is_in_one_piece(lines: list[str], piece: int, block: int, ended: bool, seeks: bool) -> None:
    text = "\n".join(lines).encode() + (b"\n" if ended else b"")
    expected = [(number, line) for number, line in enumerate(text.split(b"\n"), start=1)]
    if not expected[-1][1]:
        expected.pop()
    stream = io.BytesIO(text)
    reader = LineReader(stream, Path("a"), 100)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        for start in range(0, len(text) + 25, piece):
            if seeks:
                stream.seek(max(0, start - 1))
                reader = LineReader(stream, Path("a"), 100, max(0, start - 1))
            before = count_lines(io.BytesIO(text), start - 1) if seeks else 0
            found += [(before + number, line) for number, line in read(reader, start, start + piece)]
    assert found == expected
    assert reader.ended


def test_skipped_pieces_are_counted() -> None:
    text = b"".join(b"%d\n" % number for number in range(100))
    reader = LineReader(io.BytesIO(text), Path("a"), 100)
    assert read(reader, 0, 5) == [(1, b"0"), (2, b"1"), (3, b"2")]
    # Byte 150 is inside the line "53".
    assert read(reader, 150, 153) == [(55, b"54")]


def test_a_line_over_the_limit_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 10)
    reader = LineReader(io.BytesIO(b"short\n" + b"x" * 1000), Path("a.jsonl"), 50)
    with pytest.raises(UserError, match=r"^a\.jsonl: the line at byte 6 is over 50 bytes; divide the document"):
        read(reader, 0, 2000)
