"""How well tokenizers do on text they have not seen, and which of their pieces are used."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.data.tokenizer.kinds.protocol import Tokenizer
from megatron_moe.data.tokenizer.load import open_tokenizer
from megatron_moe.data.tokenizer.symbols import BYTES

# Kinds of text shown; the others are one line together.
_GROUPS = 20
_SHOWN_PIECES = 50
_BATCH_CHARACTERS = 1 << 20
OTHER = "(other)"


def open_all(paths: Sequence[Path]) -> list[tuple[str, Tokenizer]]:
    """Tokenizers to compare with, with their names.

    Raises:
        UserError: a path holds no tokenizer.
    """
    return [(str(path), open_tokenizer(path, "--compare")) for path in paths]


def judge_all(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], others: Sequence[tuple[str, Tokenizer]] = ()
) -> dict[str, Any]:
    """What a tokenizer and others make of the same documents.

    Args:
        tokenizer: the new one.
        texts: (kind of text, document).
        others: names and tokenizers to compare with.

    Returns:
        The totals of the text, of each kind of text, and a list of `judge` for each tokenizer, the new one first.
    """
    sizes = Counter[str]()
    for group, text in texts:
        sizes[group] += len(text)
    shown = {group for group, _ in sizes.most_common(_GROUPS)}
    grouped = [(group if group in shown else OTHER, text) for group, text in texts]
    groups: dict[str, dict[str, int]] = {}
    for group, text in grouped:
        counts = groups.setdefault(group, {"documents": 0, "characters": 0, "bytes": 0})
        counts["documents"] += 1
        counts["characters"] += len(text)
        counts["bytes"] += len(text.encode("utf-8"))
    groups = dict(sorted(groups.items(), key=lambda item: (item[0] == OTHER, -item[1]["characters"], item[0])))
    return {
        "documents": len(texts),
        "characters": sum(counts["characters"] for counts in groups.values()),
        "bytes": sum(counts["bytes"] for counts in groups.values()),
        "groups": groups,
        "tokenizers": [
            {"name": name, **judge(one, grouped, groups)} for name, one in [("this tokenizer", tokenizer), *others]
        ],
    }


def judge(tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], groups: dict[str, dict[str, int]]) -> dict[str, Any]:
    """What one tokenizer makes of documents.

    Returns:
        `characters_per_token`, `bytes_per_token` and `tokens_per_character` of all and by kind of text (None without
        text); `byte_token_share`: tokens that are single bytes for want of a piece, None where a tokenizer has no
        such pieces; `changed_documents`: documents that do not come back as they were.
    """
    used = np.zeros(tokenizer.vocab_size, np.int64)
    tokens = dict.fromkeys(groups, 0)
    changed = 0
    for block in _blocks(texts):
        ids, lengths = tokenizer.encode_batch([text for _, text in block])
        used += np.bincount(ids, minlength=tokenizer.vocab_size)
        ends = np.cumsum(lengths)
        for (group, text), end, length in zip(block, ends.tolist(), lengths.tolist(), strict=True):
            tokens[group] += length
            changed += tokenizer.decode(ids[end - length : end].tolist()) != text
    places = {piece: index for index, piece in enumerate(tokenizer.pieces)}
    byte_ids = [places[name] for name in BYTES if name in places]
    total = sum(tokens.values())
    whole = {key: sum(counts[key] for counts in groups.values()) for key in ("characters", "bytes")}
    return {
        "kind": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "tokens": total,
        **_ratios(whole, total),
        "byte_token_share": int(used[byte_ids].sum()) / total if total and len(byte_ids) == len(BYTES) else None,
        "changed_documents": changed,
        "by_group": {group: {"tokens": tokens[group], **_ratios(groups[group], tokens[group])} for group in groups},
    }


def used_pieces(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, str]], sentences: Sequence[str], learned_from: int
) -> dict[str, Any]:
    """Which learned pieces held-out documents and training sentences use.

    Args:
        tokenizer: whose pieces.
        texts: (kind of text, document).
        sentences: of the training text.
        learned_from: the first id of a learned piece.
    """
    used = np.zeros(tokenizer.vocab_size, np.int64)
    everything = [*texts, *(("", sentence) for sentence in sentences)]
    for block in _blocks(everything):
        ids, _ = tokenizer.encode_batch([text for _, text in block])
        used += np.bincount(ids, minlength=tokenizer.vocab_size)
    pieces = tokenizer.pieces
    learned = np.arange(learned_from, tokenizer.vocab_size)
    dead = learned[used[learned] == 0]
    longest = sorted(learned.tolist(), key=lambda index: (-len(pieces[index]), index))[:_SHOWN_PIECES]
    frequent = _most_used(used, learned)
    return {
        "learned": len(learned),
        "single_characters": sum(len(pieces[index]) == 1 for index in learned.tolist()),
        "measured_on_characters": sum(len(text) for _, text in everything),
        "dead": len(dead),
        "dead_examples": [pieces[index] for index in dead[:_SHOWN_PIECES].tolist()],
        "most_frequent": [{"piece": pieces[index], "id": index, "count": int(used[index])} for index in frequent],
        "longest": [{"piece": pieces[index], "id": index, "characters": len(pieces[index])} for index in longest],
    }


def _most_used(used: npt.NDArray[np.int64], learned: npt.NDArray[np.int64]) -> list[int]:
    order = np.lexsort((learned, -used[learned]))[:_SHOWN_PIECES]
    return [index for index in learned[order].tolist() if used[index]]


def _ratios(counts: dict[str, int], tokens: int) -> dict[str, float | None]:
    if not tokens:
        return dict.fromkeys(("characters_per_token", "bytes_per_token", "tokens_per_character"))
    return {
        "characters_per_token": counts["characters"] / tokens,
        "bytes_per_token": counts["bytes"] / tokens,
        "tokens_per_character": tokens / counts["characters"] if counts["characters"] else None,
    }


def _blocks(texts: Sequence[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """The texts in blocks of about a million characters, so that their ids do not all stand in memory at once."""
    blocks: list[list[tuple[str, str]]] = []
    size = _BATCH_CHARACTERS
    for text in texts:
        if size >= _BATCH_CHARACTERS:
            blocks.append([])
            size = 0
        blocks[-1].append(text)
        size += len(text[1])
    return blocks
