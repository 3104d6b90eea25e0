"""What evaluation reads and reports: token files, the windows they are cut into, losses. No torch here.

Every token of a file but its first is predicted once: windows of --seq-length tokens follow each other, and the token
after a window is predicted from it, then read as the first of the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.data.indexed import IndexedFile, open_indexed
from megatron_moe.data.stats import check_token_range
from megatron_moe.inference.score_file import perplexity


@dataclass(frozen=True)
class FileLoss:
    """Result for one token file, or for all of them together."""

    prefix: str
    loss: float
    """Mean negative log-probability of a predicted token, in nats."""
    tokens: int
    """Predicted tokens that count."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"prefix": self.prefix, "tokens": self.tokens, "loss": self.loss, "perplexity": perplexity(self.loss)}


@dataclass(frozen=True)
class Window:
    """A stretch of a token file that the model reads at once."""

    file: int
    start: int
    length: int
    """Tokens in the window, the last of which is only predicted."""


def open_data(prefixes: Sequence[str], vocab_size: int) -> list[IndexedFile]:
    """The token files to evaluate on.

    Raises:
        ConfigError: a weight was given, or a file twice.
        UserError: a pair is missing, damaged, of another tokenizer, or holds a single token.
    """
    files: list[IndexedFile] = []
    for prefix in prefixes:
        if prefix.replace(".", "", 1).isdigit() and not Path(f"{prefix}.idx").exists():
            raise ConfigError(f"--data-path {prefix}: every token is read once; give prefixes without weights")
        if prefix in (source.prefix for source in files):
            raise ConfigError(f"--data-path {prefix}: given twice")
        source = open_indexed(prefix)
        if source.num_tokens < 2:
            raise UserError(f"--data-path {prefix}: holds a single token; there is nothing to predict")
        check_token_range(source, vocab_size)
        files.append(source)
    return files


def cut_windows(files: Sequence[IndexedFile], seq_length: int) -> list[Window]:
    """Windows of up to seq_length + 1 tokens; neighbours share one, which the first predicts and the second reads."""
    return [
        Window(number, start, min(seq_length + 1, source.num_tokens - start))
        for number, source in enumerate(files)
        for start in range(0, source.num_tokens - 1, seq_length)
    ]


def combine(results: Sequence[FileLoss]) -> FileLoss:
    """All files together, every token with the same weight."""
    tokens = sum(result.tokens for result in results)
    loss = sum(result.loss * result.tokens for result in results) / tokens
    return FileLoss("all", loss, tokens)
