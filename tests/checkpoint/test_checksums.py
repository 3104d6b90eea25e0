"""Checksums of a message from the remainders of its parts are zlib's of the whole."""

import itertools
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.checkpoint.checksums import checksum, followed_by_zeros, gap, remainder


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5), st.randoms())
def test_parts_in_any_order_make_the_whole(message: bytes, cuts: list[int], random: object) -> None:
    bounds = sorted({0, len(message), *(cut for cut in cuts if cut < len(message))})
    parts = [
        followed_by_zeros(remainder(memoryview(message)[begin:end]), len(message) - end)
        for begin, end in itertools.pairwise(bounds)
    ]
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert checksum(parts, len(message)) == zlib.crc32(message)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**40))
def test_a_table_does_what_the_steps_do(value: int, count: int) -> None:
    assert gap(count)(value) == followed_by_zeros(value, count)


@pytest.mark.parametrize("count", [0, 1, 7, 4096, 100_000])
def test_zeros_are_zeros(count: int) -> None:
    assert followed_by_zeros(remainder(memoryview(b"moe")), count) == remainder(memoryview(b"moe" + bytes(count)))


def test_rows_of_a_matrix_one_after_the_other() -> None:
    rows, columns = 5, 16
    message = bytes(range(rows * columns))
    halves = []
    for half in (slice(0, 6), slice(6, columns)):
        between, value = gap(columns - (half.stop - half.start)), 0
        for row in range(rows):
            start = row * columns
            part = memoryview(message)[start + half.start : start + half.stop]
            value = remainder(part, between(value) if row else 0)
        halves.append(followed_by_zeros(value, columns - half.stop))
    assert checksum(halves, len(message)) == zlib.crc32(message)
    assert checksum(halves[:1], len(message)) != zlib.crc32(message)
