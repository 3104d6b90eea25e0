"""Punctuation repeated by mistake or for emphasis, and ASCII punctuation between Han characters."""

import re
from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.data.wudao.rules import characters
from megatron_moe.data.wudao.rules.base import Cleaner

_HAN = f"[{characters.HAN_CLASS}]"
_REPEATED = re.compile("([，、；：。！？!?～.])\\1")
# Marks that come once: a second is a slip of the finger.
_TWICE = re.compile("([，、；：])\\1+")
_FULL_STOPS = re.compile("。{2,}")
_DOTS = re.compile(f"\\.(?:(?<={_HAN}\\.)\\.{{2,}}|\\.{{2,}}(?={_HAN}))")
_ELLIPSES = re.compile("…{3,}")
_DASHES = re.compile("—{4,}")
_SHOUTS = re.compile("([！？!?～])\\1+")
_HALF = {",": "，", ";": "；", ":": "：", "!": "！", "?": "？"}
_HALF_MARK = re.compile(f"(?<={_HAN}) *([,;:!?]) *(?={_HAN}|$|\n)")
_HALF_STOP = re.compile(f"(?<={_HAN})\\.(?=$|\n)")


@dataclass(frozen=True)
class Punctuation(Cleaner):
    """Shortens repeated marks: ，，to ，; 。。 to 。; 。。。 and ... beside Han to ……; ！！！！！ to ！！！.

    All of Chinese punctuation stays Chinese: ；：、“”‘’「」『』【】《》〈〉—…· and 〇.
    """

    longest: int = 3
    """How many ！ or ？ or ～ may follow each other."""
    chinese: bool = False
    """Write , ; : ! ? between Han characters, and . at the end of a line, as ，；：！？。"""

    name: ClassVar[str] = "punctuation"
    source: ClassVar[str] = (
        "WuDaoCorpora (redundant punctuation); GB/T 15834 for …… and ——, and for three marks at most"
    )
    needs: ClassVar[int] = characters.MARK
    titles: ClassVar[bool] = True
    adds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.require(self.longest >= 1, "longest", "at least 1")

    def clean(self, text: str) -> str:
        """Shorten runs."""
        if self.chinese:
            text = _HALF_MARK.sub(lambda match: _HALF[match.group(1)], text)
            text = _HALF_STOP.sub("。", text)
        if _REPEATED.search(text):
            text = _TWICE.sub("\\1", text)
            text = _FULL_STOPS.sub(lambda match: "。" if len(match.group()) == 2 else "……", text)
            text = _DOTS.sub("……", text)
            text = _SHOUTS.sub(lambda match: match.group()[: self.longest], text)
        if "………" in text:
            text = _ELLIPSES.sub("……", text)
        if "————" in text:
            text = _DASHES.sub("——", text)
        return text
