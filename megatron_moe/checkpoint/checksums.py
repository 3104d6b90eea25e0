"""CRC-32 put together from parts, so that ranks which each read a part of a tensor check it as a whole.

A checkpoint's files carry a CRC-32 of every stored tensor. Without its initial and final inversion it is linear over
the bits of the message: the remainder of the whole is the exclusive or of the remainders of its parts, each taken with
zeros where the others are. So a rank keeps 32 bits of what it has read, and nobody reads anything twice.
"""

import functools
import zlib
from collections.abc import Iterable

_ALL = 0xFFFFFFFF
_POLYNOMIAL = 0xEDB88320
# Remainders are moved by a table where the same distance comes often, as between the rows of a matrix.
_TABLES_KEPT = 256

type Matrix = tuple[int, ...]
"""A linear map of 32 bits: the images of each bit."""


def remainder(data: memoryview, before: int = 0) -> int:
    """Remainder of a message, `before` being that of what stands in front of `data`."""
    return zlib.crc32(data, before ^ _ALL) ^ _ALL


def followed_by_zeros(value: int, count: int) -> int:
    """Remainder of a message and `count` bytes of zeros behind it."""
    if not value:
        return 0
    power = 0
    while count:
        if count & 1:
            value = _times(_zeros(power), value)
        count >>= 1
        power += 1
    return value


class Gap:
    """`followed_by_zeros` for one count of zeros, by table: four look-ups."""

    def __init__(self, count: int) -> None:
        columns = [followed_by_zeros(1 << bit, count) for bit in range(32)]
        self._tables = [
            [_times(tuple(columns[8 * byte : 8 * byte + 8]), value) for value in range(256)] for byte in range(4)
        ]

    def __call__(self, value: int) -> int:
        """The remainder behind the zeros."""
        one, two, three, four = self._tables
        return one[value & 255] ^ two[value >> 8 & 255] ^ three[value >> 16 & 255] ^ four[value >> 24]


gap = functools.lru_cache(_TABLES_KEPT)(Gap)
"""A `Gap`, made once."""


def checksum(remainders: Iterable[int], length: int) -> int:
    """CRC-32 of a message of `length` bytes from the remainders of disjoint parts that cover it."""
    value = followed_by_zeros(_ALL, length) ^ _ALL
    for part in remainders:
        value ^= part
    return value


def _times(matrix: Matrix, value: int) -> int:
    result, bit = 0, 0
    while value:
        if value & 1:
            result ^= matrix[bit]
        value >>= 1
        bit += 1
    return result


@functools.cache
def _zeros(power: int) -> Matrix:
    """What 2**power bytes of zeros do to a remainder."""
    if power:
        half = _zeros(power - 1)
        return tuple(_times(half, column) for column in half)
    columns = []
    for bit in range(32):
        value = 1 << bit
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        columns.append(value)
    return tuple(columns)
