"""generation_config.json: the ids that begin, end and pad, and how tokens are chosen."""

from typing import Any

from megatron_moe.checkpoint.hf.tokenizer import ExportedTokenizer


def special_ids(tokenizer: ExportedTokenizer) -> dict[str, int | None]:
    """The ids of config.json.

    Training puts nothing before a document but the end of the one before it, so where the tokenizer names no beginning
    the end stands for it, as in GPT-2.
    """
    begin = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    return {"bos_token_id": begin, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}


def generation_config(tokenizer: ExportedTokenizer, transformers_version: str) -> dict[str, Any]:
    """The content of generation_config.json. A model with our chat template stops at the end of a turn as well."""
    ids: dict[str, Any] = special_ids(tokenizer)
    if tokenizer.end_of_turn is not None:
        ids["eos_token_id"] = [tokenizer.eos, tokenizer.end_of_turn]
    if ids["pad_token_id"] is None:
        # Padding of a batch is masked; transformers asks for an id all the same.
        ids["pad_token_id"] = tokenizer.eos
    return {**ids, "transformers_version": transformers_version}
