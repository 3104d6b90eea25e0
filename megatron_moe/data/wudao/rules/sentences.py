"""The end of a text that stops in the middle of a sentence."""

import re
from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.data.wudao.rules.base import Cleaner

# A terminal mark and whatever closes behind it.
_CLOSING = "”’」』）)】》〉\"'］\\]"
_END = re.compile(f"[。！？!?…．][{_CLOSING}]*|(?<=[0-9A-Za-z])[.;][{_CLOSING}]*(?=\\s|$)")
_ENDS = re.compile(f"[。！？!?…．.][{_CLOSING}]*\\s*$|[{_CLOSING}]\\s*$")
_TERMINAL = frozenset("。！？…”")


@dataclass(frozen=True)
class LastSentence(Cleaner):
    """Cuts off what follows the last full sentence, as crawlers and previews stop anywhere.

    A text without any full sentence (a list, a title, an unpunctuated comment) is left whole.
    """

    most: float = 0.3
    """Cut no more than this share of the text: a longer tail is a list or a signature, not half a sentence."""

    name: ClassVar[str] = "last_sentence"
    source: ClassVar[str] = "WuDaoCorpora (truncation to the last sentence with a terminal mark); the limit is ours"
    destroys: ClassVar[str] = "a signature, date or list at the end"
    adds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self.require_share("most")

    def clean(self, text: str) -> str:
        """Cut it."""
        if text[-1:] in _TERMINAL or _ENDS.search(text, max(0, len(text) - 16)):
            return text
        begin = int(len(text) * (1.0 - self.most))
        ends = [match.end() for match in _END.finditer(text, begin)]
        return text[: ends[-1]] if ends else text
