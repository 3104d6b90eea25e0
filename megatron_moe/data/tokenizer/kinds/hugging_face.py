"""Tokenizers of Hugging Face, read by transformers without downloading or running anything."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.kinds.protocol import IdBatch, check_ids, describe, join_ids, only_text, short_hash
from megatron_moe.data.tokenizer.symbols import END_OF_DOCUMENT

# One of them is in every folder that AutoTokenizer can read.
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "config.json")


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
        """Hash of the pieces and of the merges: with other merges the same pieces give other ids."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        model = json.loads(backend.to_str())["model"] if backend is not None else {}
        parts = ["\0".join(self.pieces), json.dumps(model.get("merges", []))]
        return short_hash("\1".join(parts).encode("utf-8", "surrogatepass"))

    def encode(self, text: str) -> list[int]:
        """Ids of a text without special symbols."""
        with only_text(text):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> IdBatch:
        """Ids of many texts."""
        if not texts:
            return join_ids([])
        with only_text(*texts):
            encoded = self._tokenizer(
                list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
            )
        return join_ids(encoded["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special symbols give nothing."""
        check_ids(ids, self.vocab_size)
        return self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save_to(self, directory: Path) -> None:
        """Write transformers' files and the description."""
        describe(directory, {"tokenizer_type": type(self).__name__, "tokenizer_model": "."})
        self._tokenizer.save_pretrained(directory)
