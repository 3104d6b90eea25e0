"""What a tokenizer is to the rest of the package, and what all kinds need to be one."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError

# In a checkpoint: says which kind lies beside it.
DESCRIPTION = "megatron_moe_tokenizer.json"
# Many texts' ids: [sum(lengths)] one after the other, and [texts] how many each text has.
IdBatch = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]


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


def describe(directory: Path, description: dict[str, Any]) -> None:
    """Write which kind of tokenizer lies in a folder."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Every id must be one of the vocabulary.

    Raises:
        UserError: naming the first that is not.
    """
    # The libraries below answer an unknown id with an exception of their own, or with nothing.
    for index in ids:
        if not 0 <= index < vocab_size:
            raise UserError(f"token id {index}: must be from 0 to {vocab_size - 1}")


@contextmanager
def only_text(*texts: str) -> Iterator[None]:
    """Name what is no text where a library fails on it: half of a surrogate pair, as from a broken command line.

    Raises:
        UserError: the code inside failed, and one of the texts is not Unicode.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError) as error:
        for text in texts:
            place = next((place for place, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
            if place is not None:
                raise UserError(
                    f"text {text[:20]!r}: half of a surrogate pair at character {place}; it must be Unicode"
                ) from error
        raise


def join_ids(rows: Sequence[Sequence[int] | npt.NDArray[np.int32]]) -> IdBatch:
    """Rows of ids as `encode_batch` returns them."""
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    arrays = [np.asarray(row, np.int32) for row in rows]
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32), lengths


def short_hash(content: bytes) -> str:
    """A fingerprint of bytes."""
    return hashlib.sha256(content).hexdigest()[:16]
