"""Hyperparameters as other programs write them: `config.json`, or the arguments of a training run."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_moe.config.base import UserError
from megatron_moe.config.model import MOST_LAYERS

# Training samples of a model that is read: as long as it takes, but not the length of a book.
LONGEST_SAMPLE = 4096
_LONGEST = 60


class Settings:
    """Values by name, read with their types checked.

    Args:
        values: what the file says; None stands for what is left out.
        source: names the file in errors.
        hint: what to do where a value is missing.
    """

    def __init__(self, values: Mapping[Any, Any], source: str, hint: str = "") -> None:
        self._values, self._source, self._hint = values, source, hint

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default where it is left out or null."""
        value = self._values.get(name)
        return default if value is None else value

    def refuse(self, name: str, legal: str) -> UserError:
        """The error for a value that our model has no flag for."""
        text = repr(self._values.get(name))
        shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
        return UserError(f"{self._source}: {name} {shown}: must be {legal}")

    def layers(self, name: str, default: int | None = None) -> int:
        """A number of layers, which are counted one by one: a file that means harm must not take all memory.

        Raises:
            UserError: it is none, or larger than any model.
        """
        if (value := self.whole(name, default)) > MOST_LAYERS:
            raise self.refuse(name, f"at most {MOST_LAYERS}")
        return value

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number.

        Raises:
            UserError: it is none, too small, or left out without a default.
        """
        value = self.get(name, default)
        if value is None:
            raise UserError(f"{self._source}: lacks {name}{self._hint}")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None, least: float = 0.0) -> float:
        """A finite number.

        Raises:
            UserError: it is none, too small, or left out without a default.
        """
        value = self.get(name, default)
        if value is None:
            raise UserError(f"{self._source}: lacks {name}{self._hint}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
            raise self.refuse(name, f"a number of at least {least:g}")
        return float(value)

    def switch(self, name: str, default: bool = False) -> bool:
        """True or false.

        Raises:
            UserError: it is neither.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def choice(self, name: str, default: str, legal: Iterable[str]) -> str:
        """One of some words.

        Raises:
            UserError: it is none of them.
        """
        value = self.get(name, default)
        if value not in (words := tuple(legal)):
            raise self.refuse(name, " or ".join(words))
        assert isinstance(value, str)
        return value

    def wholes(self, name: str, default: int) -> tuple[int, ...]:
        """A list of whole numbers, or one.

        Raises:
            UserError: it is neither.
        """
        value = self.get(name, default)
        items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not items or any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in items):
            raise self.refuse(name, "whole numbers")
        return items

    def refuse_unless(self, name: str, *legal: Any, why: str) -> None:
        """Refuse a value that changes what the model computes in a way that ours cannot.

        Args:
            name: of the setting; left out or null is always legal.
            legal: values that are.
            why: what our model has instead.

        Raises:
            UserError: the value is another.
        """
        if self.get(name) is not None and self.get(name) not in legal:
            raise self.refuse(name, f"{' or '.join(map(repr, legal)) or 'left out'}; {why}")


def experts_by_layer(counts: tuple[int, ...], num_layers: int, interval: int, refuse: UserError) -> dict[str, Any]:
    """DeepSpeed's list of experts as our flags: layers K, 2K, ... have experts, those with one count are dense.

    Args:
        counts: one count, or one for each of those layers.
        num_layers: of the model.
        interval: K.
        refuse: what to raise where the list has another length.
    """
    places = range(interval, num_layers + 1, interval)
    if len(counts) not in (1, len(places)):
        raise refuse
    counts = counts * len(places) if len(counts) == 1 else counts
    by_layer = {number: count for number, count in zip(places, counts, strict=True) if count > 1}
    if not by_layer:
        return {}
    experts = tuple(by_layer.values())
    short = experts[:1] if len(set(experts)) == 1 else experts
    if len(by_layer) == len(places):
        return {"num_experts": short, "expert_interval": interval}
    pattern = tuple(int(number in by_layer) for number in range(1, num_layers + 1))
    return {"num_experts": short, "moe_layer_freq": pattern}
