"""The title of a document as its first line."""

from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.data.wudao.rules.base import Rule


@dataclass(frozen=True)
class Title(Rule):
    """Puts the title on a line of its own before the text, unless the text begins with it already.

    Without this rule the title stays a field of its own. A joined title is cleaned by the rules for characters first;
    the rules that drop short paragraphs and judge documents see the text without it.
    """

    separator: str = "\n"
    """What stands between title and text."""

    name: ClassVar[str] = "title"
    source: ClassVar[str] = "the records of WuDaoCorpora, which keep title and content apart"

    def __post_init__(self) -> None:
        self.require(bool(self.separator), "separator", "at least one character")

    def joined(self, title: str, text: str) -> str:
        """Title and text as one."""
        if not title or text == title or text.startswith(title + self.separator):
            return text
        return f"{title}{self.separator}{text}" if text else title
