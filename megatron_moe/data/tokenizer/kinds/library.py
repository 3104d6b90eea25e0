"""What the kinds that stand on the `tokenizers` library share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError

END_OF_TEXT = "<|endoftext|>"


def guarded[Made](path: Path, make: Callable[[], Made]) -> Made:
    """What `make` returns; whatever the library raises about a wrong file becomes one line.

    Raises:
        UserError: `path` is not what it should be.
    """
    try:
        return make()
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        # A panic of the Rust library is no Exception.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"--tokenizer-model {path}: tokenizers cannot load it: {reason}") from error


def list_pieces(backend: Any, path: Path) -> list[str]:
    """[vocab_size] the pieces of a `tokenizers.Tokenizer`.

    Raises:
        UserError: an id between 0 and the highest stands for nothing.
    """
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    ordered = sorted(vocabulary.items(), key=lambda pair: pair[1])
    if not ordered or [index for _, index in ordered] != list(range(len(ordered))):
        highest = ordered[-1][1] if ordered else "none"
        raise UserError(
            f"--tokenizer-model {path}: has {len(ordered)} pieces, but ids to {highest}; they must follow each other "
            "from 0"
        )
    return [piece for piece, _ in ordered]


def find_end_of_text(pieces: list[str], path: Path) -> int:
    """The id of `<|endoftext|>`.

    Raises:
        UserError: there is none.
    """
    if END_OF_TEXT not in pieces:
        raise UserError(f"--tokenizer-model {path}: has no piece {END_OF_TEXT}, which ends documents")
    return pieces.index(END_OF_TEXT)
