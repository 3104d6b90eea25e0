"""What stands in a SentencePiece `.model` file: pieces with types and scores, and how text is prepared.

The file is a protocol buffer (`sentencepiece_model.proto` in google/sentencepiece). The library hides how a model
treats spaces and what kind it is, and its generated reader needs the package protobuf, so the few fields are read here.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from megatron_moe.config.base import UserError

# Fields of ModelProto, SentencePiece, TrainerSpec and NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_NAME, _CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE = 1, 2, 3, 4, 5
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


class PieceType(IntEnum):
    """What a piece is for (SentencePiece.Type)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """A piece: its text with a space as U+2581, the score that orders merges, and its type."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class ModelFile:
    """A model.

    Attributes:
        pieces: by id.
        model_type: `bpe`, `unigram`, `word` or `char`.
        byte_fallback: unknown characters are spelled in bytes.
        normalization: name of the table; `identity` changes nothing.
        has_table: text goes through a table of replacements.
        dummy_prefix: a space is put before every text.
        removes_spaces: several spaces become one.
        escapes_spaces: a space is U+2581 inside pieces.
        space_as_suffix: words end with their space instead of beginning with it.
    """

    pieces: tuple[Piece, ...]
    model_type: str
    byte_fallback: bool
    normalization: str
    has_table: bool
    dummy_prefix: bool
    removes_spaces: bool
    escapes_spaces: bool
    space_as_suffix: bool


def parse_model(content: bytes, where: str) -> ModelFile:
    """Read the bytes of a model.

    Raises:
        UserError: it is no SentencePiece model; `where` begins the message.
    """
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(content):
            if not isinstance(value, bytes):
                continue
            if number == _PIECES:
                pieces.append(_piece(value))
            elif number == _TRAINER:
                trainer = dict(_fields(value))
            elif number == _NORMALIZER:
                normalizer = dict(_fields(value))
        name = normalizer.get(_NAME, b"")
        normalization = name.decode("utf-8") if isinstance(name, bytes) else ""
        model_type = MODEL_TYPES[int(trainer.get(_MODEL_TYPE, 1))]
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise UserError(f"{where}: not a SentencePiece model, or damaged") from error
    return ModelFile(
        pieces=tuple(pieces),
        model_type=model_type,
        byte_fallback=bool(trainer.get(_BYTE_FALLBACK, 0)),
        normalization=normalization,
        has_table=bool(normalizer.get(_CHARSMAP, b"")),
        dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        removes_spaces=bool(normalizer.get(_EXTRA_SPACES, 1)),
        escapes_spaces=bool(normalizer.get(_ESCAPE, 1)),
        space_as_suffix=bool(trainer.get(_SUFFIX, 0)),
    )


def _piece(content: bytes) -> Piece:
    fields = dict(_fields(content))
    text = fields.get(_PIECE_TEXT, b"")
    score = fields.get(_PIECE_SCORE, 0)
    if not isinstance(text, bytes) or isinstance(score, bytes):
        raise ValueError("a piece's text is no text")
    number = struct.unpack("<f", struct.pack("<I", score))[0]
    return Piece(text.decode("utf-8"), number, PieceType(int(fields.get(_PIECE_TYPE, 1))))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: numbers as they are, of fixed size too, anything of a length as bytes."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(content, at)
            yield number, value
        elif kind == _BYTES:
            size, at = _varint(content, at)
            if at + size > len(content):
                raise ValueError("a field is longer than the message")
            yield number, content[at : at + size]
            at += size
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            yield number, int.from_bytes(content[at : at + size], "little")
            at += size
        else:
            raise ValueError(f"unknown kind of field {kind}")


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number has too many bytes")
