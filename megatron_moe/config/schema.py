"""The type of every config field, read once from its dataclass and used by the flags and by the YAML files.

A field is `bool`, `int`, `float`, `str`, `Literal[...]` of strings or `tuple[int, ...]`-like, each possibly
`| None`. Any other annotation is a mistake of the programmer and raises `TypeError`.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any

from megatron_moe.config.base import field_help, flag_name

NONE_WORD = "none"
"""Unsets an optional flag: `--moe-expert-capacity-factor none`."""


@dataclass(frozen=True, kw_only=True)
class FieldSpec:
    """One config field: its name, scalar type, shape, default and help."""

    name: str
    scalar: type
    """bool, int, float or str: the type of the value, or of each item when `many`."""
    choices: tuple[str, ...] | None
    many: bool
    optional: bool
    default: Any
    """`dataclasses.MISSING` for a required field."""
    help: str

    @property
    def flag(self) -> str:
        """The flag that sets the field."""
        return flag_name(self.name)

    @property
    def legal(self) -> str:
        """What a value must be, as an error message says it."""
        if self.choices is not None:
            one = f"one of {', '.join(self.choices)}"
            return f"any of {', '.join(self.choices)}" if self.many else one
        words = {
            bool: ("true or false", "true or false"),
            int: ("an integer", "integers"),
            float: ("a finite number", "finite numbers"),
            str: ("text", "text"),
        }
        return words[self.scalar][self.many]

    def item_from_text(self, text: str) -> Any:
        """One word of the command line as this field's scalar; ValueError when it is not one."""
        if self.choices is not None and text not in self.choices:
            raise ValueError(text)
        value = self.scalar(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(text)
        return value

    def value_from_yaml(self, value: Any) -> Any:
        """A parsed YAML value as this field's value; ValueError when its type is wrong."""
        if value is None:
            if self.optional:
                return None
            raise ValueError("null")
        if not self.many:
            return self._item_from_yaml(value)
        if not isinstance(value, list):
            raise ValueError(repr(value))
        return tuple(self._item_from_yaml(item) for item in value)

    def _item_from_yaml(self, value: Any) -> Any:
        if self.scalar is float and isinstance(value, int | str) and not isinstance(value, bool):
            return self.item_from_text(str(value))  # YAML 1.1 reads 1e-5, which has no dot, as text
        if type(value) is not self.scalar:  # isinstance would take true for 1
            raise ValueError(repr(value))
        return value if self.scalar is bool else self.item_from_text(str(value))


@cache
def section_fields(section: type) -> dict[str, FieldSpec]:
    """The fields of a section dataclass by name, in the order of their definition."""
    hints = typing.get_type_hints(section)
    helps = field_help(section)
    specs = {}
    for field in dataclasses.fields(section):
        default = field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        help_text = helps.get(field.name, "")
        specs[field.name] = FieldSpec(
            name=field.name, default=default, help=help_text, **_shape(hints[field.name], field.name)
        )
    return specs


def run_sections(run_type: type) -> dict[str, type]:
    """Section name -> section dataclass of a config made of sections (`RunConfig`)."""
    hints = typing.get_type_hints(run_type)
    return {field.name: hints[field.name] for field in dataclasses.fields(run_type)}


def nearest(word: str, words: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """The word most like `word`, or None when none is alike (difflib's ratio below `likeness`)."""
    matches = get_close_matches(word, list(words), n=1, cutoff=likeness)
    return matches[0] if matches else None


def _shape(annotation: Any, name: str) -> dict[str, Any]:
    """Scalar type, choices, many and optional of an annotation."""
    optional = many = False
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        members = [member for member in typing.get_args(annotation) if member is not type(None)]
        optional = len(members) < len(typing.get_args(annotation))
        if len(members) != 1:
            raise TypeError(f"{name}: a union of several types cannot be a flag: {annotation}")
        annotation = members[0]
    if typing.get_origin(annotation) is tuple:
        item, *rest = typing.get_args(annotation)
        if rest != [Ellipsis]:
            raise TypeError(f"{name}: only tuple[T, ...] can be a flag: {annotation}")
        annotation, many = item, True
    choices = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else None
    scalar = str if choices is not None else annotation
    if scalar not in (bool, int, float, str):
        raise TypeError(f"{name}: cannot be a flag: {annotation}")
    return {"scalar": scalar, "choices": choices, "many": many, "optional": optional}
