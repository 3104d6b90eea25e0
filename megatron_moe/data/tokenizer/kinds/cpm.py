"""CPM's scheme (also PanGu-alpha's): jieba cuts words, U+2582 stands for a space and U+2583 for a newline.

TsinghuaAI/CPM-1-Generate joins the words by spaces and gives them to a SentencePiece model, whose pieces so end at
words. Back in text all spaces go, then the two marks become what they stood for. Text that holds the marks itself does
not come back; neither does what the model's own normalisation changes.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from megatron_moe.data.tokenizer.kinds.protocol import IdBatch, check_ids, describe, join_ids, only_text, short_hash
from megatron_moe.data.tokenizer.kinds.sentence_piece import SAVED_NAME, find_end_of_document, load_processor
from megatron_moe.data.tokenizer.kinds.words import load_jieba

_TO_MARKS = str.maketrans(" \n", "\u2582\u2583")
_FROM_MARKS = str.maketrans("\u2582\u2583", " \n", " ")


class CPMTokenizer:
    """CPM's `.model` file, used with jieba.

    Raises:
        UserError: the file is not a SentencePiece model or names no end of documents; jieba is not installed.
    """

    def __init__(self, model: Path) -> None:
        self._jieba = load_jieba("--tokenizer-type CPMTokenizer")
        self._model = model.read_bytes()
        self._processor = load_processor(self._model, model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.eod = find_end_of_document(self._processor, model)

    @cached_property
    def pieces(self) -> list[str]:
        """[vocab_size] the pieces, the marks as they are."""
        return [self._processor.id_to_piece(index) for index in range(self.vocab_size)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the scheme and the model file."""
        return short_hash(b"CPMTokenizer\0" + self._model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        with only_text(text):
            words = (word.translate(_TO_MARKS) for word in self._jieba.cut(text))
            return self._processor.encode(" ".join(words))

    def encode_batch(self, texts: Sequence[str]) -> IdBatch:
        """Ids of many texts."""
        return join_ids([self.encode(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control symbols give nothing."""
        check_ids(ids, self.vocab_size)
        return self._processor.decode(list(ids)).translate(_FROM_MARKS)

    def save_to(self, directory: Path) -> None:
        """Write the model and its description."""
        describe(directory, {"tokenizer_type": type(self).__name__, "tokenizer_model": SAVED_NAME})
        (directory / SAVED_NAME).write_bytes(self._model)
