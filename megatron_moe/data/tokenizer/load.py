"""Loading a tokenizer of any kind: as the flags name it, as a checkpoint keeps it, or as it lies in a folder."""

import dataclasses
import json
from pathlib import Path

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.data.tokenizer.kinds import gpt2_bpe, hugging_face, jieba_bpe, sentence_piece
from megatron_moe.data.tokenizer.kinds.cpm import CPMTokenizer
from megatron_moe.data.tokenizer.kinds.gpt2_bpe import GPT2BPETokenizer
from megatron_moe.data.tokenizer.kinds.hugging_face import HuggingFaceTokenizer
from megatron_moe.data.tokenizer.kinds.jieba_bpe import JiebaBPETokenizer
from megatron_moe.data.tokenizer.kinds.null import NullTokenizer
from megatron_moe.data.tokenizer.kinds.protocol import DESCRIPTION, IdBatch, Tokenizer
from megatron_moe.data.tokenizer.kinds.sentence_piece import SentencePieceTokenizer

__all__ = [
    "CPMTokenizer",
    "GPT2BPETokenizer",
    "HuggingFaceTokenizer",
    "IdBatch",
    "JiebaBPETokenizer",
    "NullTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_saved_tokenizer",
    "load_tokenizer",
    "open_tokenizer",
    "with_vocab_size",
]

# What stands in a description, by kind.
_SAVED_AS: dict[str, tuple[str | None, ...]] = {
    "SentencePieceTokenizer": (sentence_piece.SAVED_NAME,),
    "HuggingFaceTokenizer": (".",),
    "GPT2BPETokenizer": (".",),
    "JiebaBPETokenizer": (jieba_bpe.SAVED_NAME,),
    "CPMTokenizer": (sentence_piece.SAVED_NAME,),
    "NullTokenizer": (None,),
}
_LONGEST_DESCRIPTION = 1 << 16


def load_tokenizer(data: DataConfig, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that `--tokenizer-type` and `--tokenizer-model` name.

    Args:
        data: the data flags.
        vocab_size: `--vocab-size`, which only the NullTokenizer needs.

    Raises:
        ConfigError: a flag is missing or names no file.
        UserError: the file is not what the type says.
    """
    kind = data.tokenizer_type
    if kind == "NullTokenizer":
        if vocab_size is None:
            raise ConfigError("--tokenizer-type NullTokenizer: needs --vocab-size")
        return NullTokenizer(vocab_size)
    if data.tokenizer_model is None:
        raise ConfigError(
            f"--tokenizer-model: needed with --tokenizer-type {kind}; tools/build_tokenizer.py trains one"
        )
    path = Path(data.tokenizer_model)
    if kind == "GPT2BPETokenizer":
        return GPT2BPETokenizer(*_gpt2_files(path, data.merge_file))
    if kind == "HuggingFaceTokenizer":
        if not path.exists():
            raise ConfigError(f"--tokenizer-model {path}: no such folder; give one that holds tokenizer.json")
        if path.is_dir() and not any((path / name).is_file() for name in hugging_face.FILES):
            raise ConfigError(
                f"--tokenizer-model {path}: holds no Hugging Face tokenizer (none of {', '.join(hugging_face.FILES)})"
            )
        return HuggingFaceTokenizer(path)
    if kind == "JiebaBPETokenizer" and path.is_dir():
        path = path / jieba_bpe.SAVED_NAME
    if path.is_dir():
        hint = "give a .model file, or --tokenizer-type HuggingFaceTokenizer"
        if (path / sentence_piece.SAVED_NAME).is_file():
            hint = f"give {path / sentence_piece.SAVED_NAME}, or --tokenizer-type HuggingFaceTokenizer"
        raise ConfigError(f"--tokenizer-model {path}: is a folder; {hint}")
    if not path.is_file():
        raise ConfigError(f"--tokenizer-model {path}: no such file; tools/build_tokenizer.py writes one")
    if kind == "JiebaBPETokenizer":
        return JiebaBPETokenizer(path)
    return CPMTokenizer(path) if kind == "CPMTokenizer" else SentencePieceTokenizer(path)


def _gpt2_files(path: Path, merge_file: str | None) -> tuple[Path, Path]:
    vocab = path / gpt2_bpe.VOCAB_FILE if path.is_dir() else path
    merges = vocab.parent / gpt2_bpe.MERGE_FILE if merge_file is None else Path(merge_file)
    if not vocab.is_file():
        raise ConfigError(f"--tokenizer-model {path}: no such file {vocab}; give GPT-2's vocab.json, or its folder")
    if not merges.is_file():
        raise ConfigError(f"--merge-file: no such file {merges}; give GPT-2's merges.txt")
    return vocab, merges


def open_tokenizer(path: Path, flag: str) -> Tokenizer:
    """The tokenizer that lies in a file or folder, of whatever kind it looks like.

    Args:
        path: a SentencePiece model; a folder or a `tokenizer.json` of Hugging Face; a folder with GPT-2's vocab.json
            and merges.txt; a folder that `save_to` wrote.
        flag: where the path came from, for errors.

    Raises:
        UserError: nothing of the kind lies there.
    """
    try:
        if (path / DESCRIPTION).is_file():
            return load_saved_tokenizer(path)
        kind = "SentencePieceTokenizer"
        if path.is_dir() or path.suffix == ".json":
            has_gpt2 = all((path / name).is_file() for name in (gpt2_bpe.VOCAB_FILE, gpt2_bpe.MERGE_FILE))
            kind = "HuggingFaceTokenizer"
            if has_gpt2 and not (path / "tokenizer.json").is_file():
                kind = "GPT2BPETokenizer"
        return load_tokenizer(DataConfig(tokenizer_type=kind, tokenizer_model=str(path)))  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"{flag} {str(error).removeprefix('--tokenizer-model ')}") from error


def load_saved_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `save_to` left in a folder.

    Raises:
        UserError: there is none.
    """
    description = directory / DESCRIPTION
    if not description.is_file():
        raise UserError(f"{directory}: holds no tokenizer ({DESCRIPTION} is missing); the checkpoint is not whole")
    try:
        saved = json.loads(description.read_bytes()[:_LONGEST_DESCRIPTION])
        kind, model, vocab_size = saved["tokenizer_type"], saved.get("tokenizer_model"), saved.get("vocab_size")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{description}: damaged, does not say which tokenizer lies beside it ({reason})") from error
    # Only what `save_to` writes: a path could lead out of the folder.
    if model not in _SAVED_AS.get(kind if isinstance(kind, str) else "", ()):
        raise UserError(
            f"{description}: names {str(model)[:80]!r} of type {str(kind)[:80]!r}, which is not saved there"
        )
    if vocab_size is not None and (type(vocab_size) is not int or not 0 < vocab_size < 2**31):
        raise UserError(f"{description}: vocab_size is {str(vocab_size)[:80]!r}, no number of ids")
    data = DataConfig(tokenizer_type=kind, tokenizer_model=None if model is None else str(directory / model))
    try:
        return load_tokenizer(data, vocab_size)
    except UserError as error:
        # Nobody gave the flag.
        raise UserError(str(error).removeprefix("--tokenizer-model ")) from error


def with_vocab_size(run: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The run with the tokenizer's vocabulary size filled in.

    Raises:
        ConfigError: --vocab-size was given and is smaller than the tokenizer's.
    """
    given = run.model.vocab_size
    if given is not None and given < tokenizer.vocab_size:
        raise ConfigError(
            f"--vocab-size {given}: the tokenizer has {tokenizer.vocab_size} ids; leave it out or give at least that"
        )
    model = dataclasses.replace(run.model, vocab_size=given or tokenizer.vocab_size)
    return dataclasses.replace(run, model=model)
