"""Traditional to simplified characters."""

import functools
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_moe.data.files import require_package
from megatron_moe.data.wudao.rules import characters
from megatron_moe.data.wudao.rules.base import Cleaner
from megatron_moe.data.wudao.rules.characters import View

# Half of a pair, which is no character: OpenCC takes UTF-8.
_SURROGATE = re.compile("([\ud800-\udfff]+)")


@functools.cache
def converter() -> Any:
    """OpenCC's converter, made once in a process: loading its dictionaries takes as long as converting 100 KB."""
    return require_package("opencc", "--recipe").OpenCC("t2s")


@functools.cache
def _only_traditional() -> re.Pattern[str]:
    return re.compile(f"[{''.join(sorted(characters.traditional_characters()))}]")


def _converted(text: str) -> str:
    """The text converted until nothing changes: 吳祕 is a phrase of OpenCC's, 吴祕 first and then 吴秘."""
    convert, left = converter().convert, _only_traditional().search
    converted: str = convert(text)
    while left(converted) and (again := convert(converted)) != converted:
        converted = again
    return converted


@dataclass(frozen=True)
class Simplified(Cleaner):
    """Writes traditional text in simplified characters, word by word (乾隆 and 乾燥 differ), with OpenCC's t2s.

    A text counts as traditional by the characters that only traditional writing has, so simplified text that quotes
    one, or has 著, 瞭 or 藉 in it, is left as it stands.
    """

    share: float = 0.01
    """Convert texts in which more than this share of the Han characters is only found in traditional writing."""

    name: ClassVar[str] = "simplified"
    source: ClassVar[str] = "WuDaoCorpora (traditional to simplified); the share is ours, measured on 88 MB of verse"
    destroys: ClassVar[str] = "the traditional original, and distinctions that simplified writing does not make"
    needs: ClassVar[int] = characters.TRADITIONAL
    titles: ClassVar[bool] = True
    settled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.require_share("share")

    def prepare(self) -> None:
        """Load the dictionaries."""
        converter()

    def identity(self) -> dict[str, Any]:
        """With OpenCC's version, whose dictionaries decide the result."""
        return {**super().identity(), "opencc": require_package("opencc", "--recipe").__version__}

    def clean(self, text: str) -> str:
        """Convert the text if it is traditional."""
        return self.clean_view(View(text))

    def clean_view(self, view: View) -> str:
        """Convert the text if it is traditional."""
        if not self._traditional(view):
            return view.text
        if view.bits & characters.STRAY and _SURROGATE.search(view.text):
            pieces = _SURROGATE.split(view.text)
            return "".join(piece if _SURROGATE.match(piece) else _converted(piece) for piece in pieces)
        return _converted(view.text)

    def _traditional(self, view: View) -> bool:
        if not view.bits & characters.TRADITIONAL:
            return False
        only_traditional = view.count(characters.TRADITIONAL)
        # Most texts are Han for the greater part: these are counted late.
        return only_traditional > self.share * len(view.text) or only_traditional > self.share * view.han

    def next_view(self, text: str, view: View) -> View:
        """Han characters took the place of Han characters."""
        if len(text) != len(view.text):
            return View(text)
        return View(text, view.bits & ~characters.TRADITIONAL, view.kinds, view.han)
