"""The tokenizer of an exported folder, whose ids transformers must give alike, and that of a folder to import.

A kind has an exact twin, or it has none and its own file is copied: nothing is nearly right. What has a twin is
compared with it before the folder is finished.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.hf.texts import comparison_texts
from megatron_moe.checkpoint.layout import TOKENIZER_FOLDER
from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer import export, symbols
from megatron_moe.data.tokenizer.kinds import gpt2_bpe, sentence_piece
from megatron_moe.data.tokenizer.kinds.hugging_face import FILES
from megatron_moe.data.tokenizer.kinds.library import END_OF_TEXT
from megatron_moe.data.tokenizer.load import (
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    NullTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    open_tokenizer,
)

# What transformers notes of how it was asked, which is nobody else's concern.
_LEFT_OUT = ("is_local", "local_files_only", "split_special_tokens", "trust_remote_code", "name_or_path")
_CLASS = "PreTrainedTokenizerFast"


@dataclass(frozen=True)
class ExportedTokenizer:
    """What lies in the folder."""

    kind: str
    """Our class."""
    exact: bool
    """Whether transformers reads it."""
    note: str
    """For the card: a sentence."""
    eos: int
    """Ends documents."""
    bos: int | None = None
    pad: int | None = None
    end_of_turn: int | None = None
    """Ends a message, where the chat template is ours."""
    compared: int = 0
    """Texts that got the same ids."""


def export_tokenizer(
    tokenizer: Tokenizer, folder: Path, context: int, chat_template: str | None = None
) -> ExportedTokenizer:
    """Write a tokenizer into an exported folder.

    Args:
        tokenizer: the model's.
        folder: written so far, with its config.json, which decides what transformers makes of the files.
        context: most tokens that the model reads at once.
        chat_template: jinja, instead of the tokenizer's own.

    Raises:
        UserError: transformers gives other ids, or the template is no jinja.
    """
    if chat_template is not None:
        check_template(chat_template)
    kind = type(tokenizer).__name__
    problem = _write_twin(tokenizer, folder, context)
    if problem is not None:
        tokenizer.save_to(folder / TOKENIZER_FOLDER)
        if chat_template is not None:
            (folder / export.CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        return ExportedTokenizer(kind, False, f"transformers has no exact tokenizer for it: {problem}", tokenizer.eod)
    if chat_template is not None:
        (folder / export.CHAT_TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")
        _change_config(folder, {"chat_template": chat_template})
    return _compare(tokenizer, folder)


def import_tokenizer(folder: Path, vocab_size: int, given: str | None = None, flag: str = "--hf") -> Tokenizer:
    """The tokenizer of a Hugging Face folder; for a folder that we wrote, the one that it was made from.

    Args:
        folder: of the model.
        vocab_size: rows of its embedding.
        given: a path to use instead, or `NullTokenizer` for ids without text.
        flag: that named the folder.

    Raises:
        UserError: there is none, or it has ids that the embedding has no row for.
    """
    if given == "NullTokenizer":
        return NullTokenizer(vocab_size)
    path, flag = (folder, flag) if given is None else (Path(given), "--tokenizer")
    if given is None and (folder / TOKENIZER_FOLDER).is_dir():
        path = folder / TOKENIZER_FOLDER
    elif given is None and not any((folder / name).is_file() for name in FILES if name != "config.json"):
        raise UserError(
            f"{flag} {folder}: holds no tokenizer (tokenizer.json or tokenizer.model is missing); give one with "
            "--tokenizer PATH, or --tokenizer NullTokenizer for ids without text"
        )
    tokenizer = open_tokenizer(path, flag)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{flag} {path}: the tokenizer has {tokenizer.vocab_size} ids, but the model's embedding has {vocab_size} "
            "rows; give the tokenizer that the model was trained with"
        )
    return tokenizer


def check_template(template: str) -> None:
    """A chat template must at least be jinja.

    Raises:
        UserError: the line that is not.
    """
    from jinja2 import Environment, TemplateError

    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"--chat-template: line {line}: {str(error).splitlines()[0]}; give a jinja template") from error


def _write_twin(tokenizer: Tokenizer, folder: Path, context: int) -> str | None:
    """Write what transformers reads, or say why it has no such tokenizer."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        with tempfile.TemporaryDirectory() as scratch:
            tokenizer.save_to(Path(scratch))
            content = (Path(scratch) / sentence_piece.SAVED_NAME).read_bytes()
        try:
            files = export.hugging_face_files(content, "the tokenizer", context)
        except UserError as error:
            return str(error).removeprefix("the tokenizer: ").removeprefix("cannot be exported to Hugging Face: ")
        tokenizer.save_to(folder)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return None
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save_to(folder)
        _change_config(folder, {})
        return None
    if isinstance(tokenizer, GPT2BPETokenizer):
        tokenizer.save_to(folder)
        _write_gpt2_twin(folder, context)
        return None
    if isinstance(tokenizer, NullTokenizer):
        return "the model was trained on ids without text"
    return f"a {type(tokenizer).__name__} cuts words with jieba first"


def _write_gpt2_twin(folder: Path, context: int) -> None:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    vocab, merges = (str(folder / name) for name in (gpt2_bpe.VOCAB_FILE, gpt2_bpe.MERGE_FILE))
    backend = Backend(models.BPE.from_file(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    backend.save(str(folder / export.TOKENIZER_FILE))
    tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    config = {
        "tokenizer_class": _CLASS,
        **tokens,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    (folder / export.CONFIG_FILE).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _change_config(folder: Path, changes: dict[str, Any]) -> None:
    path = folder / export.CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in _LEFT_OUT} | changes
    if config.get("tokenizer_class") == "TokenizersBackend":
        # Its name since transformers 5; both know the older one.
        config["tokenizer_class"] = _CLASS
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _compare(tokenizer: Tokenizer, folder: Path) -> ExportedTokenizer:
    """Read the twin as a user does, and let both encode the same texts."""
    twin = _load(folder)
    # A longer text would be warned about; nothing is cut here.
    twin.model_max_length = sys.maxsize
    texts = comparison_texts(tokenizer)
    for text in texts:
        ours = tokenizer.encode(text)
        theirs = twin.encode(text, add_special_tokens=False, split_special_tokens=True)
        if ours != theirs:
            place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
            raise UserError(
                f"tokenizer: transformers gives {text[:30]!r}... other ids than {type(tokenizer).__name__}, "
                f"first at token {place}: {theirs[place : place + 3]} for {ours[place : place + 3]}; it cannot be "
                "exported"
            )
    if twin.eos_token_id != tokenizer.eod:
        _name_end_of_document(tokenizer, folder)
        twin = _load(folder)
    template = twin.chat_template
    return ExportedTokenizer(
        kind=type(tokenizer).__name__,
        exact=True,
        note=f"the same ids as in training for {len(texts)} texts compared",
        eos=tokenizer.eod,
        bos=twin.bos_token_id,
        pad=twin.pad_token_id,
        end_of_turn=twin.convert_tokens_to_ids(symbols.END_OF_TURN) if template == symbols.CHAT_TEMPLATE else None,
        compared=len(texts),
    )


def _name_end_of_document(tokenizer: Tokenizer, folder: Path) -> None:
    """A Hugging Face tokenizer with `<eod>` beside an eos_token: documents end with the former here."""
    _change_config(folder, {"eos_token": tokenizer.pieces[tokenizer.eod]})


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(level)
