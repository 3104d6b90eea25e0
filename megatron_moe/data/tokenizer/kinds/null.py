"""No tokenizer: ids written as numbers."""

from collections.abc import Sequence
from pathlib import Path

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.kinds.protocol import IdBatch, check_ids, describe, join_ids, short_hash


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
        return short_hash(f"NullTokenizer {self.vocab_size}".encode())

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
        check_ids(ids, self.vocab_size)
        return " ".join(str(index) for index in ids if index != self.eod)

    def save_to(self, directory: Path) -> None:
        """Write the description."""
        describe(directory, {"tokenizer_type": type(self).__name__, "vocab_size": self.vocab_size})
