"""What a recipe writes of a document: which fields, under which names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.config.base import ConfigError
from megatron_moe.data.wudao.document import Document


@dataclass(frozen=True)
class Record:
    """The fields of an output record, in this order: constants, text, title, kept fields.

    Attributes:
        text: the name of the text.
        title: the name of the title, empty to leave it out; a title joined to the text is left out too.
        keep: fields of the input to write as they are, where the input has them.
        constants: fields with a value of their own, such as an empty instruction.
    """

    text: str = "text"
    title: str = ""
    keep: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [*self.constants, self.text, *([self.title] if self.title else []), *self.keep]
        if not self.text:
            raise ConfigError("record.text: must be a name")
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(f"record: {twice[0]} is written twice; give each field a name of its own")

    def of(self, document: Document) -> dict[str, Any]:
        """The record of a document."""
        record = {**self.constants, self.text: document.text}
        if self.title and document.title:
            record[self.title] = document.title
        for name in self.keep:
            if name in document.meta:
                record[name] = document.meta[name]
        return record
