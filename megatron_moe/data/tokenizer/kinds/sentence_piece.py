"""SentencePiece `.model` files, given back exactly even where a text holds U+2581."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.kinds.protocol import IdBatch, check_ids, describe, join_ids, only_text, short_hash
from megatron_moe.data.tokenizer.symbols import END_OF_DOCUMENT, SPACE_MARK

SAVED_NAME = "tokenizer.model"


def load_processor(content: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    """A model from the bytes of its file.

    Raises:
        UserError: they are none.
    """
    if not content:
        # SentencePiece takes it for a model without pieces and logs about it later.
        raise UserError(f"--tokenizer-model {path}: is empty; tools/build_tokenizer.py writes one anew")
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        # A damaged file can load and fail later: pieces that are no UTF-8, scores that are no numbers.
        size = processor.get_piece_size()
        last = [processor.id_to_piece(index) for index in range(size)][-100:]
        processor.decode(processor.encode(" ".join(last)))
    except (RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"--tokenizer-model {path}: not a SentencePiece model, or damaged") from error
    return processor


def find_end_of_document(processor: sentencepiece.SentencePieceProcessor, path: Path) -> int:
    """The id of `<eod>`, or else of the end of a sentence.

    Raises:
        UserError: the model has neither.
    """
    named = processor.piece_to_id(END_OF_DOCUMENT)
    eod: int = named if named != processor.unk_id() else processor.eos_id()
    if not 0 <= eod < processor.get_piece_size():
        raise UserError(f"--tokenizer-model {path}: has no {END_OF_DOCUMENT} and no end-of-sentence piece")
    return eod


class SentencePieceTokenizer:
    """A SentencePiece `.model` file.

    Raises:
        UserError: the file is not a SentencePiece model, or has neither `<eod>` nor an end-of-sentence
            symbol.
    """

    def __init__(self, model: Path) -> None:
        self._model = model.read_bytes()
        self._processor = load_processor(self._model, model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.eod = find_end_of_document(self._processor, model)
        # SPACE_MARK stands for the space inside SentencePiece, so text that holds one must spell it in bytes to get
        # it back.
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._can_spell_mark = self._processor.unk_id() not in self._mark_ids

    @cached_property
    def pieces(self) -> list[str]:
        """[vocab_size] the pieces, a space as U+2581."""
        return [self._processor.id_to_piece(index) for index in range(self.vocab_size)]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the model file."""
        return short_hash(self._model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; with byte fallback and identity normalisation `decode` gives the same text back."""
        if SPACE_MARK not in text or not self._can_spell_mark:
            with only_text(text):
                return self._processor.encode(text)
        first, *others = text.split(SPACE_MARK)
        ids = self.encode(first)
        for part in others:
            ids += self._mark_ids
            ids += self.encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> IdBatch:
        """Ids of many texts; SentencePiece hands them over as buffers, which costs less than lists of numbers."""
        with only_text(*texts):
            rows = self._processor.encode_as_numpy(list(texts), num_threads=1)
        if self._can_spell_mark:
            for place, text in enumerate(texts):
                if SPACE_MARK in text:
                    rows[place] = np.array(self.encode(text), np.int32)
        return join_ids(rows)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control symbols give nothing, bytes that are no UTF-8 give U+FFFD."""
        check_ids(ids, self.vocab_size)
        return self._processor.decode(list(ids))

    def save_to(self, directory: Path) -> None:
        """Write the model and its description."""
        describe(directory, {"tokenizer_type": type(self).__name__, "tokenizer_model": SAVED_NAME})
        (directory / SAVED_NAME).write_bytes(self._model)
