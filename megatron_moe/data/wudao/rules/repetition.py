"""Documents that say the same again and again: repeated n-grams of characters, repeated lines."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from megatron_moe.data.wudao.rules import characters
from megatron_moe.data.wudao.rules.base import Filter
from megatron_moe.data.wudao.rules.characters import View, codes_of

# An odd multiplier with bits all over (the golden ratio).
_MIX = np.uint32(0x9E3779B1)
_SHIFT = np.uint32(15)
# With fewer n-grams comparing pieces of the text costs less than hashes.
_FEW = 150


@dataclass(frozen=True)
class RepeatedNgrams(Filter):
    """Drops documents in which most n-grams of characters come more than once, without regard to case and space."""

    ngram: int = 13
    """Characters in an n-gram."""
    most: float = 0.5
    """Drop documents in which a greater share of the n-grams has a copy."""

    name: ClassVar[str] = "repeated_ngrams"
    source: ClassVar[str] = "EvalWeb (13-grams, 0.5); data-juicer's default is 0.5 of 10-grams"
    destroys: ClassVar[str] = "litanies, lyrics with long refrains, forms"

    def __post_init__(self) -> None:
        self.require(self.ngram >= 2, "ngram", "at least 2")
        self.require_share("most")

    def reason(self, view: View) -> str | None:
        """Compare the share of n-grams with a copy."""
        share = self.share(view)
        return f"{share:.2f} of the {self.ngram}-grams repeat, more than {self.most}" if share > self.most else None

    def share(self, view: View) -> float:
        """The share of n-grams with a copy; 0 where a quick look shows that it is not above `most`."""
        text = view.text
        if view.bits & (characters.SPACE | characters.NEWLINE):
            text = "".join(text.split())
        if view.bits & (characters.LATIN | characters.LETTER):
            text = text.lower()
        count = len(text) - self.ngram + 1
        if count < 2 or (count < _FEW and not self._may_repeat(text, count)):
            return 0.0
        hashes = _ngrams(codes_of(text), self.ngram)
        hashes.sort()
        same = hashes[1:] == hashes[:-1]
        if not same.any():
            return 0.0
        # A hash has a copy if it equals the one before or the one after.
        repeated = np.count_nonzero(same[1:] | same[:-1]) + int(same[0]) + int(same[-1])
        return float(repeated) / count

    def _may_repeat(self, text: str, count: int) -> bool:
        """False only if the share is not above `most`.

        The text is cut into blocks of (n + 1) / 2 characters, so every n-gram holds the first block that begins in it,
        and of an n-gram with copies the earliest holds a block with a later copy. If no block that begins before x has
        one, no n-gram that begins before x, less a block, has a copy at all: looking at the first 1 - `most` of the
        text is enough.
        """
        size = (self.ngram + 1) // 2
        find = text.find
        for start in range(0, int((1.0 - self.most) * count) + 2 * size, size):
            block = text[start : start + size]
            if len(block) == size and find(block, start + 1) != -1:
                return True
        return False


def _ngrams(codes: npt.NDArray[np.uint32], n: int) -> npt.NDArray[np.uint32]:
    """A hash of every n values that follow each other, by joining runs of 1, 2, 4, ... values.

    With 32 bits, one in 40,000 n-grams of a text of 100,000 characters wrongly has a copy: nothing beside a share.
    """
    count = len(codes) - n + 1
    result = np.zeros(count, dtype=np.uint32)
    run, width, covered = codes, 1, 0
    while True:
        if n & width:
            result *= _MIX
            result += run[covered : covered + count]
            covered += width
        if covered == n:
            return result
        run = run[:-width] * _MIX + run[width:]
        run ^= run >> _SHIFT
        width *= 2


@dataclass(frozen=True)
class RepeatedLines(Filter):
    """Drops documents with many lines that stood there before, to the letter: `whitespace` comes first."""

    most_lines: float = 0.3
    """Drop documents in which a greater share of the lines is a copy of an earlier one."""
    most_characters: float = 0.2
    """Drop documents in which a greater share of the characters is in such lines."""

    name: ClassVar[str] = "repeated_lines"
    source: ClassVar[str] = "Gopher (0.30 of the lines, 0.20 of the characters)"
    destroys: ClassVar[str] = "lyrics with refrains, scripts of plays with short answers"

    def __post_init__(self) -> None:
        self.require_share("most_lines", "most_characters")

    def reason(self, view: View) -> str | None:
        """Compare both shares."""
        lines = view.text.split("\n")
        if len(lines) < 2 or len(set(lines)) == len(lines):
            return None
        seen: set[str] = set()
        total = copies = length = copied = 0
        for line in lines:
            if not line:
                continue
            total += 1
            length += len(line)
            if line in seen:
                copies += 1
                copied += len(line)
            seen.add(line)
        if copies > self.most_lines * total:
            return f"{copies / total:.2f} of the lines are copies, more than {self.most_lines}"
        if copied > self.most_characters * length:
            return f"{copied / length:.2f} of the characters are in copied lines, more than {self.most_characters}"
        return None
