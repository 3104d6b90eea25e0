"""A SentencePiece model as a Hugging Face tokenizer whose ids are the same for every text.

transformers' own conversion of a `tokenizer.model` guesses how spaces and bytes are treated and gives other ids. Here
`tokenizer.json` is made from the model itself:

- The vocabulary is that of the model with a real space in place of U+2581, and text is not changed before it is cut.
  So U+2581 in a text is a character like any other and goes through byte fallback, as in `SentencePieceTokenizer`.
- SentencePiece keeps no merges: it joins the two neighbours whose joint piece has the best score, the left ones first
  among equals. `tokenizers` wants ranked pairs, so every way to cut a piece in two becomes a merge, in the order of the
  scores; `_order_ties` keeps "the left ones first" where two cuts of one piece can overlap.
- Control symbols are special tokens, which no merge makes; the newline takes part in no merge; user symbols are added
  tokens that are found before anything else, the longest first, as in SentencePiece.

One thing differs by default: transformers turns text that spells a special token into that token, which the chat
template needs. Give it `split_special_tokens=True` for text of unknown origin, as `HuggingFaceTokenizer` does.
"""

import json
from collections.abc import Sequence
from typing import Any

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer import symbols
from megatron_moe.data.tokenizer.model_file import ModelFile, Piece, PieceType, parse_model

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"


def hugging_face_files(content: bytes, where: str, context: int | None = None) -> dict[str, str]:
    """The files of a Hugging Face tokenizer, by name.

    Args:
        content: a SentencePiece model as `build` makes it.
        where: names the model in errors.
        context: the longest sequence the model takes; unlimited by default.

    Raises:
        UserError: the model treats text in a way that has no exact counterpart; the message says which.
    """
    model = parse_model(content, where)
    check_exportable(model, where)
    special = {
        "unk_token": symbols.UNKNOWN,
        "bos_token": symbols.BEGIN,
        "eos_token": symbols.END_OF_DOCUMENT,
        "pad_token": symbols.PAD,
        "sep_token": "<sep>",
        "mask_token": "<mask>",
    }
    present = {piece.text for piece in model.pieces if piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)}
    missing = sorted(set(special.values()) - present)
    if missing:
        raise UserError(f"{where}: lacks the special tokens {', '.join(missing)}; tools/build_tokenizer.py makes them")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "clean_up_tokenization_spaces": False,
        # As it is anyhow; llama.cpp's converter puts a begin and a space in front of a text unless these say no.
        "add_bos_token": False,
        "add_prefix_space": False,
        # Generation goes on at the right end.
        "padding_side": "left",
        "model_max_length": context or int(1e30),
        "model_input_names": ["input_ids", "attention_mask"],
    }
    files = {
        # Without line breaks: Python's writer of indented JSON takes a third of a second for 50,000 pieces.
        TOKENIZER_FILE: json.dumps(tokenizer_json(model), ensure_ascii=False) + "\n",
        SPECIAL_TOKENS_FILE: _dump(special),
    }
    if {symbols.SYSTEM, symbols.USER, symbols.ASSISTANT, symbols.END_OF_TURN} <= present:
        config["chat_template"] = symbols.CHAT_TEMPLATE
        files[CHAT_TEMPLATE_FILE] = symbols.CHAT_TEMPLATE
    files[CONFIG_FILE] = _dump(config)
    return files


def check_exportable(model: ModelFile, where: str) -> None:
    """Refuse a model whose ids `tokenizers` could not give for every text.

    Raises:
        UserError: says what stands in the way.
    """
    reason = ""
    if model.model_type == "unigram":
        reason = (
            "a unigram model has no exact counterpart: SentencePiece adds scores in 32 bits, tokenizers in 64, and "
            "between equal cuts, as of a run of dashes, they choose differently; train with --model-type bpe"
        )
    elif model.model_type != "bpe":
        reason = f"its type is {model.model_type}; only bpe can be exported"
    elif not model.byte_fallback:
        reason = "it has no byte fallback"
    elif model.normalization != "identity" or model.has_table:
        reason = f"it normalises text ({model.normalization or 'a table of its own'}); only identity can be exported"
    elif model.dummy_prefix or model.removes_spaces or not model.escapes_spaces or model.space_as_suffix:
        reason = "it changes spaces; export needs add_dummy_prefix=false and remove_extra_whitespaces=false"
    if reason:
        raise UserError(f"{where}: cannot be exported to Hugging Face: {reason}")


def tokenizer_json(model: ModelFile) -> dict[str, Any]:
    """The content of `tokenizer.json` for a BPE model that `check_exportable` lets through."""
    vocabulary = {_own(piece): index for index, piece in enumerate(model.pieces)}
    added = []
    for index, piece in enumerate(model.pieces):
        special = piece.type in (PieceType.CONTROL, PieceType.UNKNOWN)
        if special or (piece.type == PieceType.USER_DEFINED and piece.text != "\n"):
            added.append(
                {
                    "id": index,
                    "content": piece.text,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": special,
                }
            )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": symbols.UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges(model.pieces),
        },
    }


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every pair of pieces that SentencePiece may join, the best one first."""
    normal = {_own(piece): piece.score for piece in pieces if piece.type == PieceType.NORMAL}
    found: list[tuple[str, str]] = []
    # Sorting is stable: pieces of one score keep the order of their ids.
    for joint in sorted(normal, key=lambda text: -normal[text]):
        cuts = [(joint[:at], joint[at:]) for at in range(1, len(joint))]
        found += _order_ties([(left, right) for left, right in cuts if left in normal and right in normal])
    return found


def _order_ties(cuts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Cuts of one piece in the order of their ranks.

    All have one score in SentencePiece, so where two of them overlap in a text the left one wins. (a, b) and (b, c)
    overlap in the text a b c, where (a, b) is the left one and must have the better rank. Both orders would be needed
    only for powers of one string, such as (x, xx) and (xx, x); there the pieces of a run stand in falling length, and
    the left one is that with the longer left part.
    """
    left_parts = {left for left, _ in cuts}
    powers = {cut for cut in cuts if cut[0] + cut[1] == cut[1] + cut[0]}

    def rank(cut: tuple[str, str]) -> tuple[int, int]:
        if cut in powers:
            return 0, -len(cut[0])
        return (0 if cut[1] in left_parts else 1), 0

    return sorted(cuts, key=rank)


def _own(piece: Piece) -> str:
    """A piece's name in the exported vocabulary."""
    return piece.text.replace(symbols.SPACE_MARK, " ") if piece.type == PieceType.NORMAL else piece.text


def _dump(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False, indent=1) + "\n"
