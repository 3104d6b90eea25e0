"""`--data-path` and its kin: which token files in which shares."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.base import ConfigError
from megatron_moe.data.indexed import IndexedFile, open_indexed


@dataclass(frozen=True)
class Blend:
    """Token files and the share of samples drawn from each.

    Attributes:
        files: the checked pairs, in the order given.
        weights: one positive number a file; only their ratios matter.
    """

    files: tuple[IndexedFile, ...]
    weights: tuple[float, ...]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Paths without ending."""
        return tuple(source.prefix for source in self.files)


def parse_blend(words: Sequence[str], flag: str) -> Blend:
    """Read prefixes, or weights and prefixes in turn, and open every pair.

    Without weights files are drawn from in proportion to their tokens.

    Args:
        words: the flag's values, as `("0.3", "a", "0.7", "b")` or `("a", "b")`.
        flag: its name, for errors.

    Raises:
        ConfigError: no value, a weight that is none, a number that is followed by no prefix, or a file twice.
        UserError: a pair is missing or damaged.
    """
    if not words:
        raise ConfigError(f"{flag}: needs at least one prefix of a .bin/.idx pair")
    if not any(_is_number(word) for word in words):
        files = _open_all(words, flag)
        return Blend(files, tuple(float(source.num_tokens) for source in files))
    if len(words) % 2:
        raise ConfigError(
            f"{flag} {' '.join(words)}: weights and prefixes must come in turn (0.3 a 0.7 b), "
            f"but there are {len(words)} words"
        )
    weights = []
    for word, prefix in zip(words[::2], words[1::2], strict=True):
        if not _is_number(word):
            raise ConfigError(f"{flag}: {word!r} before {prefix!r} must be a weight (0.3 a 0.7 b)")
        if not (math.isfinite(float(word)) and float(word) > 0):
            raise ConfigError(f"{flag}: weight {word} of {prefix} must be greater than 0")
        weights.append(float(word))
    return Blend(_open_all(words[1::2], flag), tuple(weights))


def _open_all(prefixes: Sequence[str], flag: str) -> tuple[IndexedFile, ...]:
    """Open every pair once: two entries of one file would read each of its samples twice an epoch."""
    seen: set[Path] = set()
    for prefix in prefixes:
        if Path(prefix).resolve() in seen:
            raise ConfigError(f"{flag}: {prefix} is given twice; give it once, with the sum of its weights")
        seen.add(Path(prefix).resolve())
    return tuple(open_indexed(prefix, flag) for prefix in prefixes)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
