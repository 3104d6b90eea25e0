"""Documents by their length, their share of Han characters and the length of their lines."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.data.wudao.rules.base import Filter
from megatron_moe.data.wudao.rules.characters import View


@dataclass(frozen=True)
class Length(Filter):
    """Drops documents that are too short or too long."""

    least: int = 200
    """Drop documents with fewer characters."""
    most: int | None = None
    """Drop documents with more characters."""

    name: ClassVar[str] = "length"
    source: ClassVar[str] = "EvalWeb (200 characters); data-juicer's recipe for Chinese instructions has 10"
    destroys: ClassVar[str] = "short news, verse, comments"

    def __post_init__(self) -> None:
        self.require_count("least")
        self.require(self.most is None or self.most >= self.least, "most", f"at least {self.least}, which is `least`")

    def reason(self, view: View) -> str | None:
        """Compare the length."""
        length = len(view.text)
        if length < self.least:
            return f"{length} characters, fewer than {self.least}"
        if self.most is not None and length > self.most:
            return f"{length} characters, more than {self.most}"
        return None


@dataclass(frozen=True)
class HanRatio(Filter):
    """Drops documents with a small share of Han characters among the visible ones."""

    least: float = 0.3
    """Drop documents with a smaller share."""

    name: ClassVar[str] = "han_ratio"
    source: ClassVar[str] = "EvalWeb (0.3); PanGu-α has 0.6 and WuDaoCorpora 0.7"
    destroys: ClassVar[str] = "programming and mathematics, bilingual text, from about 0.6 on"

    def __post_init__(self) -> None:
        self.require_share("least")

    def reason(self, view: View) -> str | None:
        """Compare the share."""
        han = view.han
        if han >= self.least * len(view.text) and han:
            return None
        visible = view.visible
        if han >= self.least * visible and visible:
            return None
        return f"{han / visible:.2f} of the characters are Han, less than {self.least}" if visible else "no characters"


@dataclass(frozen=True)
class LineLength(Filter):
    """Drops documents of short lines: menus, tables, word lists."""

    least: float = 10.0
    """Drop documents with a smaller mean number of characters in a line that is not blank."""

    name: ClassVar[str] = "line_length"
    source: ClassVar[str] = "EvalWeb (10 characters)"
    destroys: ClassVar[str] = "verse of five characters a line, lyrics"

    def __post_init__(self) -> None:
        self.require_count("least")

    def reason(self, view: View) -> str | None:
        """Compare the mean."""
        text = view.text
        lines = text.count("\n") + 1
        if len(text) - lines + 1 >= self.least * lines:
            return None
        lengths = [len(line) for line in text.split("\n") if line and not line.isspace()]
        mean = sum(lengths) / max(1, len(lengths))
        return f"{mean:.1f} characters in a line, fewer than {self.least}" if mean < self.least else None
