"""Prompts of generation: where they come from, and how their continuations are written. No torch here."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.data.documents import parse_document
from megatron_moe.data.files import iterate_lines, open_stream
from megatron_moe.data.tokenizer.load import Tokenizer
from megatron_moe.inference.options import GenerateOptions

JSON_LINES = (".jsonl", ".jsonl.gz")


def read_prompts(options: GenerateOptions) -> list[str]:
    """The texts to continue, from --prompt or --prompt-file.

    Raises:
        UserError: the file is missing or empty, or a line of it is not what its name says.
    """
    if options.prompt is not None:
        return list(options.prompt)
    assert options.prompt_file is not None
    path = Path(options.prompt_file)
    if not path.is_file():
        raise UserError(f"--prompt-file {path}: no such file")
    prompts = list(_read_file(path))
    if not prompts:
        raise UserError(f"--prompt-file {path}: the file is empty")
    return prompts


def _read_file(path: Path) -> Iterator[str]:
    with open_stream(path) as (stream, _):
        for number, line in enumerate(iterate_lines(stream, path), start=1):
            if path.name.endswith(JSON_LINES):
                yield parse_document(line, "text", path, number)
                continue
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error
            if not text.strip():
                raise UserError(f"{path} line {number}: empty line; every line must be a prompt")
            yield text


def encode_prompts(prompts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of every prompt; an empty one starts a new document, as training text does after an end of document."""
    return [tokenizer.encode(prompt) or [tokenizer.eod] for prompt in prompts]


def check_lengths(prompts: Sequence[Sequence[int]], max_new_tokens: int, max_positions: int) -> None:
    """Every prompt and its continuation must fit the model.

    Raises:
        ConfigError: the first prompt that does not.
    """
    for number, ids in enumerate(prompts, start=1):
        if len(ids) + max_new_tokens > max_positions:
            room = max_positions - len(ids)
            cure = f"give at most {room}" if room >= 1 else "give a shorter prompt"
            raise ConfigError(
                f"--max-new-tokens {max_new_tokens}: with the {len(ids)} tokens of prompt {number} that is more than "
                f"the {max_positions} positions of the model (--max-position-embeddings); {cure}"
            )


def continuation_text(tokenizer: Tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """Text of new tokens as it follows the prompt's; decoded alone, they would lose a space at their beginning."""
    head = tokenizer.decode(prompt_ids)
    return tokenizer.decode([*prompt_ids, *new_ids])[len(head) :]


def describe(row: dict[str, Any]) -> str:
    """A line of the output for the screen: how it went, then the whole text."""
    return f"--- {len(row['ids'])} new tokens, {row['finish_reason']}\n{row['prompt']}{row['text']}"
