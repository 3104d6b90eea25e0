"""What preprocessing does with every document, and the totals it reports."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.base import ConfigError
from megatron_moe.config.data import DataConfig
from megatron_moe.config.model import MOST_DOMAINS
from megatron_moe.data.tokenizer.load import Tokenizer

# SentencePiece and its input need up to 35 bytes of memory a byte of text: two workers stay below 1 GB. A Hugging Face
# tokenizer needs several times that.
MAX_DOCUMENT_BYTES = 8 << 20
# Raised when the same options begin to give other token files, so that parts of an older version are not mixed in.
_VERSION = 1


@dataclass(frozen=True)
class Preprocessing:
    """What to do with every document.

    Attributes:
        data: names the tokenizer.
        vocab_size: for the NullTokenizer only.
        json_keys: fields of a record that hold text; each becomes a pair of its own.
        append_eod: end every document with the end-of-document id.
        split_sentences: a sequence a sentence instead of a sequence a document.
        max_length: tokens a document may have, its end among them; what is over is cut off and counted.
        domain_key: field that holds a document's domain.
        domains: their names in the order of their numbers; None: all that occur, in the order in which they do.
        max_document_bytes: longer texts (in UTF-8) are refused, which is what bounds memory.

    Raises:
        ConfigError: a flag that cannot be.
    """

    data: DataConfig
    vocab_size: int | None = None
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = True
    split_sentences: bool = False
    max_length: int | None = None
    domain_key: str | None = None
    domains: tuple[str, ...] | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES

    def __post_init__(self) -> None:
        if not self.json_keys:
            raise ConfigError("--json-keys: name at least one field")
        for place, key in enumerate(self.json_keys):
            if key in self.json_keys[:place]:
                raise ConfigError(f"--json-keys {key}: is given twice")
            if len(self.json_keys) > 1 and (not key or "/" in key or "\0" in key):
                raise ConfigError(f"--json-keys {key!r}: becomes part of a file's name and cannot hold '/' or be empty")
        least = 1 + self.append_eod
        if self.max_length is not None and self.max_length < least:
            why = " (a token, and the end of the document)" if self.append_eod else ""
            raise ConfigError(f"--max-length {self.max_length}: must be at least {least}{why}")
        if self.max_document_bytes < 1:
            raise ConfigError(f"--max-document-bytes {self.max_document_bytes}: must be at least 1")
        self._check_domains()

    def _check_domains(self) -> None:
        if self.domain_key is not None and self.domain_key in self.json_keys:
            raise ConfigError(f"--domain-key {self.domain_key}: is one of --json-keys, which hold text")
        if self.domains is None:
            return
        if self.domain_key is None:
            raise ConfigError("--domains: needs --domain-key, the field they stand in")
        twice = next((name for place, name in enumerate(self.domains) if name in self.domains[:place]), None)
        if twice is not None:
            raise ConfigError(f"--domains {twice}: is given twice")
        if not 1 <= len(self.domains) <= MOST_DOMAINS:
            raise ConfigError(f"--domains: {len(self.domains)} names; must be 1 to {MOST_DOMAINS}")

    @property
    def columns(self) -> tuple[str, ...]:
        """What a finished part consists of, for every field; see `workspace.py`."""
        columns: tuple[str, ...] = ("bin", "lengths")
        if self.split_sentences:
            columns += ("documents",)
        return (*columns, "domains") if self.domain_key is not None else columns

    def prefixes(self, output_prefix: Path) -> dict[str, Path]:
        """The pair each field is written to: the prefix itself for one field, PREFIX_FIELD for several."""
        if len(self.json_keys) == 1:
            return {self.json_keys[0]: output_prefix}
        return {key: Path(f"{output_prefix}_{key}") for key in self.json_keys}

    def options(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """All that decides which token files an input gives, by the names of the flags."""
        return {
            "format": _VERSION,
            "tokenizer_type": self.data.tokenizer_type,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "json_keys": list(self.json_keys),
            "append_eod": self.append_eod,
            "split_sentences": self.split_sentences,
            "max_length": self.max_length,
            "domain_key": self.domain_key,
            "domains": None if self.domains is None else list(self.domains),
        }


def fingerprint(options: dict[str, Any]) -> str:
    """A short hash of options."""
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Totals:
    """Counts of one field.

    Attributes:
        documents: documents written.
        empty: documents without any token, which are left out.
        sequences: sequences written; as many as documents without --split-sentences.
        tokens: ids written, ends of documents among them.
        cut_documents: documents over --max-length.
        cut_tokens: ids cut off them.
        characters, text_bytes: text of the documents written, before it was cut; bytes of UTF-8.
    """

    documents: int = 0
    empty: int = 0
    sequences: int = 0
    tokens: int = 0
    cut_documents: int = 0
    cut_tokens: int = 0
    characters: int = 0
    text_bytes: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def chars_per_token(self) -> float:
        """Characters of text per id, those that were cut off among them."""
        tokens = self.tokens + self.cut_tokens
        return self.characters / tokens if tokens else 0.0


@dataclass(frozen=True)
class Output:
    """One pair that was written.

    Attributes:
        prefix: path without ending.
        key: the field it holds.
        documents, sequences, tokens: what is in it.
    """

    prefix: Path
    key: str
    documents: int
    sequences: int
    tokens: int


@dataclass(frozen=True)
class PreprocessReport:
    """What a run read and wrote.

    Attributes:
        totals: counts by field.
        outputs: the pairs, in order.
        inputs: the files read, in order.
        parts: pieces of the input the work was divided into.
        resumed: how many of them an earlier, unfinished run had done.
        seconds: wall-clock time.
        file: the same as JSON, beside the pairs.
    """

    totals: dict[str, Totals]
    outputs: tuple[Output, ...]
    inputs: tuple[Path, ...]
    parts: int
    resumed: int
    seconds: float
    file: Path
