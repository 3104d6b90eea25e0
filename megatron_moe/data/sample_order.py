"""The order of samples without end, as arithmetic: epochs of one file, and turns of the files of a blend.

Nothing here depends on how many samples a run asks for, so the order is the same however long the run is, whatever
its batch size and layout are, and wherever it was resumed.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

import numpy as np
import numpy.typing as npt

_ROUNDS = 8
_KEYS = struct.Struct(f"<{_ROUNDS}Q")
_WORD = (1 << 64) - 1


@dataclass(frozen=True)
class EpochOrder:
    """Position in a file's own stream -> sample of its sample index, which holds one epoch.

    Epoch 0 goes through the index as it is, which megatron-core has shuffled; every later one takes all samples in
    another order, chosen by the seed, the file's place in the blend and the epoch.
    """

    size: int
    """Samples of one epoch."""
    seed: int
    file: int

    def locate(self, position: int) -> tuple[int, int]:
        """Epoch, and the sample in it."""
        epoch, place = divmod(position, self.size)
        if epoch == 0:
            return epoch, place
        return epoch, permute(place, self.size, round_keys(self.seed, self.file, epoch))


def permute(place: int, size: int, keys: Sequence[int]) -> int:
    """Where a keyed permutation of range(size) sends `place`; no memory, whatever the size is.

    A Feistel network on pairs of digits to the base ceil(sqrt(size)), which permutes a range of at most
    size + 2 sqrt(size) + 1 places; it is walked on until it is back below size (cycle walking; Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, CT-RSA 2002). A step is invertible whatever `_mix` gives, so this is a
    permutation for every key.
    """
    base = isqrt(size - 1) + 1 if size > 1 else 1
    while True:
        high, low = divmod(place, base)
        for key in keys:
            high, low = low, (high + _mix(low ^ key)) % base
        place = high * base + low
        if place < size:
            return place


@lru_cache(maxsize=4096)
def round_keys(seed: int, file: int, epoch: int) -> tuple[int, ...]:
    """Keys of the permutation of an epoch; the same on every machine and in every Python."""
    text = f"{seed} {file} {epoch}".encode()
    return _KEYS.unpack(hashlib.blake2b(text, digest_size=_KEYS.size).digest())


def _mix(word: int) -> int:
    """SplitMix64's output function (Steele, Lea, Flood, OOPSLA 2014)."""
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _WORD
    return word ^ (word >> 31)


class BlendOrder:
    """Position in a blend's stream -> file, and position in that file's own stream.

    A pattern of some length is repeated without end. So no index as long as the run is needed, which megatron-core's
    BlendedDataset would write for a number of samples that is known beforehand.

    Args:
        files: [P] the file that serves each position of the pattern.
        turns: [P] how many positions before it in the pattern are of the same file.
    """

    def __init__(self, files: npt.NDArray[np.int16], turns: npt.NDArray[np.int64]) -> None:
        self._files = files
        # Half the memory: turns are below P.
        self._turns = turns.astype(np.uint32)
        self._counts = [int(count) for count in np.bincount(files)]

    def locate(self, position: int) -> tuple[int, int]:
        """File, and position in its stream."""
        repeat, place = divmod(position, len(self._files))
        file = int(self._files[place])
        return file, repeat * self._counts[file] + int(self._turns[place])
