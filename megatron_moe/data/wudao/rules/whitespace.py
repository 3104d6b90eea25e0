"""White space that carries no meaning."""

import re
from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.data.wudao.rules import characters
from megatron_moe.data.wudao.rules.base import Cleaner
from megatron_moe.data.wudao.rules.characters import View

_HAN = f"[{characters.HAN_CLASS}]"
_CHINESE = f"[{characters.HAN_CLASS}{characters.CJK_PUNCTUATION_CLASS}]"
# Every pattern begins with the rare character that it is about, so that searching is fast.
_LINE_TAIL = re.compile("[ \t\u3000]+(?=\n)")
# An ideographic space is always typography; ASCII indentation only before Chinese, for code needs its own.
_INDENT = re.compile(f"\n(?:[ \t]*\u3000[ \t\u3000]*|[ \t]+(?=[“‘—…{_CHINESE[1:]}))")
_RUN = re.compile(f"[ \t\u3000](?:(?<={_CHINESE}[ \t\u3000])[ \t\u3000]+|[ \t\u3000]+(?={_CHINESE}))")
_BEFORE_MARK = re.compile(f"[ \u3000]+(?=[{characters.CLOSING_MARKS}])")
_AFTER_MARK = re.compile(f"[ \u3000](?<=[，。！？；：、{characters.OPENING_MARKS}][ \u3000])[ \u3000]*")
# Below this length searching costs less than looking at the kinds.
_SHORT = 256
_BLANK_LINES = re.compile("\n{3,}")


@dataclass(frozen=True)
class Whitespace(Cleaner):
    """Removes indentation of prose, space at line ends and around Chinese punctuation, and more than one blank line.

    Runs of spaces beside Chinese become one. Line ends, the indentation of code, tabs and single spaces (第一章　总则,
    张三 李四) stay.
    """

    name: ClassVar[str] = "whitespace"
    source: ClassVar[str] = "WuDaoCorpora (redundant spaces)"
    destroys: ClassVar[str] = "the layout of tables made with spaces"
    needs: ClassVar[int] = characters.SPACE | characters.NEWLINE
    titles: ClassVar[bool] = True
    adds: ClassVar[bool] = False
    settled: ClassVar[bool] = True

    def clean(self, text: str) -> str:
        """Normalise it."""
        return self.clean_view(View(text))

    def clean_view(self, view: View) -> str:
        """Normalise it."""
        text = view.text
        if view.bits & characters.SPACE:
            before, after = (True, True) if len(text) < _SHORT else _beside_marks(view)
            text = _tidied(text, before=before, after=after)
        if "\n\n\n" in text:
            text = _BLANK_LINES.sub("\n\n", text)
        return text.strip("\n")

    def next_view(self, text: str, view: View) -> View:
        """The Han characters are those that there were."""
        return View(text, view.bits, None, view.han)


def _beside_marks(view: View) -> tuple[bool, bool]:
    """Whether a space stands before, or after, a mark: English and code are full of spaces that do not."""
    here, there = view.kinds[:-1], view.kinds[1:]
    before = ((here & characters.SPACE) * (there & characters.TIGHT)).any()
    after = ((here & characters.TIGHT) * (there & characters.SPACE)).any()
    return bool(before), bool(after)


def _tidied(text: str, *, before: bool, after: bool) -> str:
    """Without space at line ends, before Chinese, without runs of it, and without what is before and after marks."""
    text = f"\n{text}\n"
    if " \n" in text or "\t\n" in text or "\u3000\n" in text:
        text = _LINE_TAIL.sub("", text)
    if "\n " in text or "\n\t" in text or "\n\u3000" in text:
        text = _INDENT.sub("\n", text)
    if "  " in text or "\t" in text or "\u3000" in text:
        text = _RUN.sub(lambda match: match.group()[0], text)
    if before:
        text = _BEFORE_MARK.sub("", text)
    return _AFTER_MARK.sub("", text) if after else text


@dataclass(frozen=True)
class SpelledOut(Cleaner):
    """Joins Han characters written apart, as headings of notices are: 通 知 如 下 文 件."""

    least: int = 6
    """Where at least so many follow each other."""

    name: ClassVar[str] = "spelled_out"
    source: ClassVar[str] = "WuDaoCorpora (redundant spaces); six characters are ours"
    destroys: ClassVar[str] = "the spaces in lists of single characters: 子 丑 寅 卯 辰 巳"
    needs: ClassVar[int] = characters.SPACE
    titles: ClassVar[bool] = True
    adds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.require(self.least >= 3, "least", "at least 3")

    def clean(self, text: str) -> str:
        """Join them."""
        return self.clean_view(View(text))

    def clean_view(self, view: View) -> str:
        """Join them."""
        text = view.text
        if text.count(" ") + text.count("\u3000") < self.least - 1:
            return text
        space = view.kinds & characters.SPACE
        # A Han character between two spaces: the table's bit 1 under the bit of space.
        if not (space[:-2] & space[2:] & (view.kinds[1:-1] << 1)).any():
            return text
        pattern = f"(?<!{_CHINESE}){_HAN}(?:[ \u3000]+{_HAN}){{{self.least - 1},}}(?!{_HAN})"
        return re.sub(pattern, lambda match: match.group().replace(" ", "").replace("\u3000", ""), text)
