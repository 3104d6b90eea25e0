"""One document on its way through the rules of a recipe."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Document:
    """A record of a corpus, taken apart.

    Attributes:
        text: the content, which rules change.
        title: the title, empty where the record has none.
        meta: what else the record held: id, uniqueKey, titleUkey, dataType and so on.
    """

    text: str
    title: str = ""
    meta: dict[str, Any] = field(default_factory=dict)
