"""GPT-2's byte-level BPE: a `vocab.json` and a `merges.txt`, as Megatron-LM's GPT2BPETokenizer takes them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.kinds.library import find_end_of_text, guarded, list_pieces
from megatron_moe.data.tokenizer.kinds.protocol import IdBatch, check_ids, describe, join_ids, only_text, short_hash

VOCAB_FILE, MERGE_FILE = "vocab.json", "merges.txt"


class GPT2BPETokenizer:
    """Byte-level BPE with GPT-2's way of cutting words; any text comes back as it was.

    Args:
        vocab_file: `{"piece": id}`.
        merge_file: a merge a line, the best first.

    Raises:
        UserError: the files are not what they should be, or the vocabulary has no `<|endoftext|>`.
    """

    def __init__(self, vocab_file: Path, merge_file: Path) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        try:
            self._files = vocab_file.read_bytes(), merge_file.read_bytes()
        except OSError as error:
            raise UserError(f"--tokenizer-model {error.filename}: cannot be read: {error.strerror}") from error

        def make() -> Any:
            backend = Tokenizer(models.BPE.from_file(str(vocab_file), str(merge_file)))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
            return backend

        self._backend = guarded(vocab_file, make)
        # [vocab_size]
        self.pieces = list_pieces(self._backend, vocab_file)
        self.eod = find_end_of_text(self.pieces, vocab_file)
        self.vocab_size = len(self.pieces)
        missing = [
            letter for letter in pre_tokenizers.ByteLevel.alphabet() if self._backend.token_to_id(letter) is None
        ]
        if missing:
            raise UserError(
                f"--tokenizer-model {vocab_file}: lacks {len(missing)} of the 256 bytes, so text would be lost; "
                "is it GPT-2's byte-level vocabulary?"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Hash of both files."""
        return short_hash(b"\0".join(self._files))

    def encode(self, text: str) -> list[int]:
        """Ids of a text; one that spells `<|endoftext|>` is spelled in pieces."""
        with only_text(text):
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> IdBatch:
        """Ids of many texts."""
        with only_text(*texts):
            rows = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return join_ids([row.ids for row in rows])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, documents' ends left out."""
        check_ids(ids, self.vocab_size)
        text: str = self._backend.decode([index for index in ids if index != self.eod], skip_special_tokens=False)
        return text

    def save_to(self, directory: Path) -> None:
        """Write both files and the description."""
        describe(directory, {"tokenizer_type": type(self).__name__, "tokenizer_model": "."})
        for name, content in zip((VOCAB_FILE, MERGE_FILE), self._files, strict=True):
            (directory / name).write_bytes(content)
