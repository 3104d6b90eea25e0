"""One way to replace an upstream symbol: by name, with a reason, checked to exist before anything is touched."""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron_moe.config.base import UserError


@dataclass(frozen=True)
class Replacement:
    """`module.attribute` becomes `value`, because of `reason`. A class is written `module:Class`."""

    module: str
    attribute: str
    value: Any
    reason: str

    def owner(self) -> Any:
        """The module or class that holds the attribute."""
        module, _, cls = self.module.partition(":")
        owner = importlib.import_module(module)
        return getattr(owner, cls) if cls else owner

    @property
    def name(self) -> str:
        """Where the symbol lives, for messages."""
        return f"{self.module}.{self.attribute}"

    def exists(self) -> bool:
        """Whether upstream still has the symbol there."""
        try:
            return hasattr(self.owner(), self.attribute)
        except (ImportError, AttributeError):
            return False


def missing(replacements: Iterable[Replacement]) -> list[str]:
    """Names of the symbols that upstream no longer has where they are expected."""
    return [replacement.name for replacement in replacements if not replacement.exists()]


def apply(replacements: Iterable[Replacement]) -> None:
    """Replace every symbol, or none.

    Raises:
        UserError: a symbol has moved; the message names it and the version that has it.
    """
    replacements = list(replacements)
    moved = missing(replacements)
    if moved:
        raise UserError(
            f"megatron-core: {', '.join(moved)} not found, so this version cannot be used; "
            "install megatron-core>=0.19,<0.20"
        )
    for replacement in replacements:
        setattr(replacement.owner(), replacement.attribute, replacement.value)
