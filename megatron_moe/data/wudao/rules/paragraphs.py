"""Paragraphs too short to be prose: menus, buttons, captions."""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.data.wudao.rules import characters
from megatron_moe.data.wudao.rules.base import Cleaner

_HAN = f"[{characters.HAN_CLASS}]"
_OTHER = f"[^{characters.HAN_CLASS}]"
_OTHER_IN_LINE = f"[^{characters.HAN_CLASS}\n]"
_END_MARKS = "。！？!?…．.；;：:，,、”’」』）)》〉】\"'］]"
_ENDS = frozenset(_END_MARKS)
# From a line end: the line before has no mark at its end; the line after has no Han.
_NO_MARK = f"(?<=[^{re.escape(_END_MARKS)}\n]\n)"
_NO_HAN = f"{_OTHER_IN_LINE}*+(?:\n|\\Z)"
_NO_HAN_FOLLOWS = re.compile(f"\n{_NO_HAN}")
_UNSURE = re.compile(f"\n(?:{_NO_MARK}|{_NO_HAN})")
_ORDINAL = "〇零一二三四五六七八九十百千"
_HEADING = re.compile(
    f"第[{_ORDINAL}0-9０-９]+[章节節条條款卷编編部篇回幕场讲課课集则]|[{_ORDINAL}]+(?:[、，.．]|$)"
    f"|[（(][{_ORDINAL}0-9０-９]+[)）]|[0-9０-９]+(?:[.．][0-9０-９]+)*[、.． ）)]|[①-⑳㈠-㈩]|#{{1,6}} "
)
_HAN_SEARCH = re.compile(_HAN).search
_BLANK = re.compile("\n{3,}")


@functools.cache
def _at_least(count: int) -> Callable[[str], object]:
    """Whether a line has so many Han characters."""
    return re.compile(f"(?:{_OTHER}*+{_HAN}){{{count}}}").match


def _unsure(text: str) -> bool:
    """Whether a line below the first may be no sentence, of a text with a mark at its end: a quick look."""
    first_end = text.find("\n")
    if first_end < 0:
        return False
    return bool(_NO_HAN_FOLLOWS.match(text, first_end) or _UNSURE.search(text, first_end + 1))


@dataclass(frozen=True)
class ShortParagraphs(Cleaner):
    """Drops paragraphs (lines) with few Han characters.

    The paper drops all of them, which takes dialogue, headings, verse, code and English paragraphs from clean text; the
    options say which stay.
    """

    least_han: int = 10
    """Drop paragraphs with fewer Han characters."""
    sentences: bool = True
    """Keep short ones that end with punctuation: dialogue, lines of verse, introductions of lists."""
    headings: bool = True
    """Keep short ones that begin like a heading or a list item: 第三条, 一、, （二）, 2.1, ①."""
    first: bool = True
    """Keep the first paragraph, which may be the title."""
    foreign: int = 20
    """Keep those without Han that have at least so many visible characters, and code (indented lines); 0 drops all."""

    name: ClassVar[str] = "short_paragraphs"
    source: ClassVar[str] = "WuDaoCorpora (fewer than 10 Chinese characters); what stays is ours"
    destroys: ClassVar[str] = "headings without a number, signatures, table cells; all short lines when nothing is kept"
    adds: ClassVar[bool] = False
    settled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require_count("least_han", "foreign")

    def clean(self, text: str) -> str:
        """Drop them; blank lines stay where a paragraph stays after them."""
        if self.sentences and self.first and text[-1:] in _ENDS and not _unsure(text):
            return text
        enough = _at_least(self.least_han)
        lines = text.split("\n")
        kept = [line for line in lines if not line or self._stays(line, enough)]
        if len(kept) == len(lines):
            return text
        if self.first and lines[0] and (not kept or kept[0] is not lines[0]):
            kept.insert(0, lines[0])
            if len(kept) == len(lines):
                return text
        return _BLANK.sub("\n\n", "\n".join(kept)).strip("\n")

    def _stays(self, line: str, enough: Callable[[str], object]) -> bool:
        if not line.isascii():
            # The end of a line is looked at first, which costs least.
            if self.sentences and line[-1] in _ENDS and _HAN_SEARCH(line):
                return True
            if enough(line) or (self.headings and _HEADING.match(line) and _HAN_SEARCH(line)):
                return True
        elif self.least_han == 0:
            return True
        if not self.foreign:
            return False
        if line[0] in " \t":
            return True
        return len(line) - line.count(" ") >= self.foreign and (line.isascii() or not _HAN_SEARCH(line))
