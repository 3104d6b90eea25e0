"""Tokenizers as the rest of the package sees them: one protocol, three kinds, saved beside checkpoints."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.data.tokenizer.build import END_OF_DOCUMENT

# Many texts' ids: [sum(lengths)] one after the other, and [texts] how many each text has.
IdBatch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]

# In a checkpoint: says which kind lies beside it.
_DESCRIPTION = "megatron_moe_tokenizer.json"
_SENTENCEPIECE_FILE = "tokenizer.model"
# One of them is in every folder that AutoTokenizer can read.
_HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "config.json")
# What stands in a description, by kind.
_SAVED_AS: dict[str, tuple[str | None, ...]] = {
    "SentencePieceTokenizer": (_SENTENCEPIECE_FILE,),
    "HuggingFaceTokenizer": (".",),
    "NullTokenizer": (None,),
}
_LONGEST_DESCRIPTION = 1 << 16
# U+2581 stands for the space inside SentencePiece, so text that holds one must spell it in bytes to get it
# back.
_SPACE_MARK = "\u2581"


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def eod(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is below it."""
        ...

    @property
    def pieces(self) -> list[str]:
        """[vocab_size] the text of every id as the tokenizer names it."""
        ...

    @property
    def fingerprint(self) -> str:
        """A short hash of everything that decides which ids a text gets."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any added symbol."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> IdBatch:
        """The ids that `encode` gives for each of many texts, as arrays and without a Python list in between."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; the end-of-document id and other control symbols give nothing."""
        ...

    def save_to(self, directory: Path) -> None:
        """Write all that `load_saved_tokenizer` needs into an existing or new folder."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece `.model` file.

    Raises:
        UserError: the file is not a SentencePiece model, or has neither `<eod>` nor an end-of-sentence
            symbol.
    """

    def __init__(self, model: Path) -> None:
        self._model = model.read_bytes()
        if not self._model:
            # SentencePiece takes it for a model without pieces and logs about it later.
            raise UserError(f"--tokenizer-model {model}: is empty; tools/build_tokenizer.py writes one anew")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
            self.vocab_size: int = self._processor.get_piece_size()
            # A damaged file can load and fail later: pieces that are no UTF-8, scores that are no numbers.
            self._processor.decode(self._processor.encode(" ".join(self.pieces[-100:])))
        except (RuntimeError, UnicodeDecodeError) as error:
            raise UserError(f"--tokenizer-model {model}: not a SentencePiece model, or damaged") from error
        named = self._processor.piece_to_id(END_OF_DOCUMENT)
        self.eod: int = named if named != self._processor.unk_id() else self._processor.eos_id()
        if not 0 <= self.eod < self.vocab_size:
            raise UserError(f"--tokenizer-model {model}: has no {END_OF_DOCUMENT} and no end-of-sentence piece")
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._can_spell_mark = self._processor.unk_id() not in self._mark_ids

    @cached_property
    def pieces(self) -> list[str]:
        """[vocab_size] the pieces, a space as U+2581."""
        return [self._processor.id_to_piece(index) for index in range(self.vocab_size)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model file."""
        return _hash(self._model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; with byte fallback and identity normalisation `decode` gives the same text back."""
        if _SPACE_MARK not in text or not self._can_spell_mark:
            return self._processor.encode(text)
        first, *others = text.split(_SPACE_MARK)
        ids = self._processor.encode(first)
        for part in others:
            ids += self._mark_ids
            ids += self._processor.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> IdBatch:
        """Ids of many texts; SentencePiece hands them over as buffers, which costs less than lists of numbers."""
        if self._can_spell_mark and any(_SPACE_MARK in text for text in texts):
            return join_ids([self.encode(text) for text in texts])
        return join_ids(self._processor.encode_as_numpy(list(texts), num_threads=1))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control symbols give nothing, bytes that are no UTF-8 give U+FFFD."""
        _check_ids(ids, self.vocab_size)
        return self._processor.decode(list(ids))

    def save_to(self, directory: Path) -> None:
        """Write the model and its description."""
        _describe(directory, {"tokenizer_type": type(self).__name__, "tokenizer_model": _SENTENCEPIECE_FILE})
        (directory / _SENTENCEPIECE_FILE).write_bytes(self._model)


class HuggingFaceTokenizer:
    """A folder (or `tokenizer.json`) that transformers' `AutoTokenizer` reads; nothing is downloaded, and no code of
    the folder is run.

    Raises:
        UserError: the folder holds no tokenizer, or one without an end-of-text symbol.
    """

    def __init__(self, folder: Path) -> None:
        # transformers takes seconds to import, and only this kind needs it.
        from transformers import AutoTokenizer

        source = folder if folder.is_dir() else folder.parent
        try:
            # Without the False transformers asks on the terminal whether to run code that the folder names.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
            # Text that spells a special symbol must not become one.
            self._tokenizer.split_special_tokens = True
            self.vocab_size: int = len(self._tokenizer)
            vocabulary = self._tokenizer.get_vocab()
            eod = vocabulary.get(END_OF_DOCUMENT, self._tokenizer.eos_token_id)
            highest = max(vocabulary.values(), default=-1)
            # Damage may show only in use.
            self.decode(self.encode("a \u4e2d")[:1])
        except (KeyboardInterrupt, SystemExit, UserError):
            raise
        except BaseException as error:
            # transformers raises whatever a wrong value leads to; a panic of its Rust library is no Exception.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"--tokenizer-model {folder}: transformers cannot load a tokenizer: {reason}") from error
        if eod is None:
            raise UserError(f"--tokenizer-model {folder}: has no {END_OF_DOCUMENT} and no eos_token")
        if not 0 <= highest < self.vocab_size or not 0 <= eod < self.vocab_size:
            raise UserError(
                f"--tokenizer-model {folder}: has {self.vocab_size} pieces, but ids to {max(highest, eod)}; they must "
                "follow each other from 0"
            )
        self.eod: int = eod

    @cached_property
    def pieces(self) -> list[str]:
        """[vocab_size] the pieces in the tokenizer's own spelling."""
        return self._tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the pieces."""
        return _hash("\0".join(self.pieces).encode("utf-8", "surrogatepass"))

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special symbols."""
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> IdBatch:
        """Ids of many texts."""
        if not texts:
            return join_ids([])
        return join_ids(
            self._tokenizer(
                list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
            )["input_ids"]
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special symbols give nothing."""
        _check_ids(ids, self.vocab_size)
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save_to(self, directory: Path) -> None:
        """Write transformers' files and the description."""
        _describe(directory, {"tokenizer_type": type(self).__name__, "tokenizer_model": "."})
        self._tokenizer.save_pretrained(directory)


class NullTokenizer:
    """No tokenizer: text is ids in decimal, separated by spaces, and the last id ends a document."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1

    @property
    def pieces(self) -> list[str]:
        """[vocab_size] the ids as text."""
        return [str(index) for index in range(self.vocab_size)]

    @property
    def fingerprint(self) -> str:
        """Hash of the size."""
        return _hash(f"NullTokenizer {self.vocab_size}".encode())

    def encode(self, text: str) -> list[int]:
        """Ids of a text like `"3 17 5"`.

        Raises:
            UserError: a word is no id.
        """
        ids = []
        for word in text.split():
            if not (word.isascii() and word.isdigit()) or int(word) >= self.vocab_size:
                raise UserError(f"NullTokenizer: {word[:40]!r} is not an id from 0 to {self.vocab_size - 1}")
            ids.append(int(word))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> IdBatch:
        """Ids of many texts; raises what `encode` raises."""
        return join_ids([self.encode(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """The ids as text, documents' ends left out."""
        _check_ids(ids, self.vocab_size)
        return " ".join(str(index) for index in ids if index != self.eod)

    def save_to(self, directory: Path) -> None:
        """Write the description."""
        _describe(directory, {"tokenizer_type": type(self).__name__, "vocab_size": self.vocab_size})


def join_ids(rows: Sequence[Sequence[int] | npt.NDArray[np.int32]]) -> IdBatch:
    """Rows of ids as `encode_batch` returns them."""
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    arrays = [np.asarray(row, np.int32) for row in rows]
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32), lengths


def load_tokenizer(data: DataConfig, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that `--tokenizer-type` and `--tokenizer-model` name.

    Args:
        data: the data flags.
        vocab_size: `--vocab-size`, which only the NullTokenizer needs.

    Raises:
        ConfigError: a flag is missing or names no file.
        UserError: the file is not what the type says.
    """
    if data.tokenizer_type == "NullTokenizer":
        if vocab_size is None:
            raise ConfigError("--tokenizer-type NullTokenizer: needs --vocab-size")
        return NullTokenizer(vocab_size)
    if data.tokenizer_model is None:
        raise ConfigError(
            f"--tokenizer-model: needed with --tokenizer-type {data.tokenizer_type}; "
            "tools/build_tokenizer.py trains one"
        )
    path = Path(data.tokenizer_model)
    if data.tokenizer_type == "HuggingFaceTokenizer":
        if not path.exists():
            raise ConfigError(f"--tokenizer-model {path}: no such folder; give one that holds tokenizer.json")
        if path.is_dir() and not any((path / name).is_file() for name in _HUGGING_FACE_FILES):
            raise ConfigError(
                f"--tokenizer-model {path}: holds no Hugging Face tokenizer (none of {', '.join(_HUGGING_FACE_FILES)})"
            )
        return HuggingFaceTokenizer(path)
    if path.is_dir():
        raise ConfigError(
            f"--tokenizer-model {path}: is a folder; give a .model file, or --tokenizer-type HuggingFaceTokenizer"
        )
    if not path.is_file():
        raise ConfigError(f"--tokenizer-model {path}: no such file; tools/build_tokenizer.py writes <prefix>.model")
    return SentencePieceTokenizer(path)


def load_saved_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `save_to` left in a folder.

    Raises:
        UserError: there is none.
    """
    description = directory / _DESCRIPTION
    if not description.is_file():
        raise UserError(f"{directory}: holds no tokenizer ({_DESCRIPTION} is missing); the checkpoint is not whole")
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


def _describe(directory: Path, description: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    # The libraries below answer an unknown id with an exception of their own, or with nothing.
    for index in ids:
        if not 0 <= index < vocab_size:
            raise UserError(f"token id {index}: must be from 0 to {vocab_size - 1}")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
