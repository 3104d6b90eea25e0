"""The files of scoring: token sequences in, a line of scores for each out. No torch here."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.documents import check_input_files, check_text, parse_object
from megatron_moe.data.files import iterate_lines, open_stream
from megatron_moe.data.tokenizer.load import Tokenizer

# exp of more is not a number that JSON can hold.
_LARGEST_EXPONENT = 700.0


def read_sequences(
    path: Path, tokenizer: Tokenizer, vocab_size: int, max_positions: int
) -> list[npt.NDArray[np.int32]]:
    """Token ids of every line.

    A line is a JSON object with `text`, which is encoded without any added symbol, or with `ids`. Other fields are not
    looked at.

    Args:
        path: JSON Lines, .gz too.
        tokenizer: the model's.
        vocab_size: ids must be below it.
        max_positions: tokens that the model reads at once; a sequence may be one longer, as its last token is not read.

    Raises:
        UserError: the file cannot be read, or a line of it cannot be scored; the message names the line.
    """
    check_input_files([path])
    sequences = []
    with open_stream(path) as (stream, _):
        for number, line in enumerate(iterate_lines(stream, path), start=1):
            where = f"{path} line {number}"
            ids = _line_ids(parse_object(line, "the field 'text' or 'ids'", path, number), tokenizer, where)
            _check_ids(ids, vocab_size, max_positions, where)
            sequences.append(np.array(ids, dtype=np.int32))
    return sequences


def score_row(ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32]) -> dict[str, Any]:
    """A line of the output.

    Args:
        ids: [N] token ids.
        logprobs: [N - 1] natural logarithms of the probabilities of the second token and every later one.

    Returns:
        `ids`, `logprobs`, their `sum` and `mean`, and `perplexity` = exp(-mean), at most e^700.
    """
    total = float(logprobs.astype(np.float64).sum())
    mean = total / len(logprobs)
    return {
        "ids": ids.tolist(),
        "logprobs": logprobs.tolist(),
        "sum": total,
        "mean": mean,
        "perplexity": perplexity(-mean),
    }


def perplexity(loss: float) -> float:
    """exp of a mean loss in nats, at most e^700."""
    return math.exp(min(loss, _LARGEST_EXPONENT))


def _line_ids(entry: dict[str, Any], tokenizer: Tokenizer, where: str) -> list[int]:
    if ("text" in entry) == ("ids" in entry):
        problem = "holds both 'text' and 'ids'" if "text" in entry else "has neither 'text' nor 'ids'"
        raise UserError(f"{where}: {problem}; give one of them")
    if "text" in entry:
        return tokenizer.encode(check_text(entry["text"], "text", where))
    ids = entry["ids"]
    # bool is an int to Python, but true is no token.
    if not isinstance(ids, list) or not all(type(index) is int for index in ids):
        raise UserError(f"{where}: field 'ids' must be a list of integers")
    return ids


def _check_ids(ids: list[int], vocab_size: int, max_positions: int, where: str) -> None:
    if len(ids) < 2:
        count = "1 token" if ids else "no tokens"
        raise UserError(f"{where}: {count}; scoring needs at least 2, because the first has nothing before it")
    if len(ids) > max_positions + 1:
        raise UserError(
            f"{where}: {len(ids)} tokens; the model reads at most {max_positions} positions, so it can score at most "
            f"{max_positions + 1} tokens"
        )
    wrong = next((index for index in ids if not 0 <= index < vocab_size), None)
    if wrong is not None:
        raise UserError(f"{where}: token id {wrong}; must be from 0 to {vocab_size - 1}")
