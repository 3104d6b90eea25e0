"""Refuses to go on from a checkpoint with a tokenizer of another vocabulary: its ids would stand for other text."""

from pathlib import Path

from megatron_moe.checkpoint.layout import TOKENIZER_FOLDER
from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.tokenizer.load import Tokenizer, load_saved_tokenizer


def check_same_tokenizer(data: DataConfig, tokenizer: Tokenizer, checkpoint: Path) -> None:
    """Compare a run's tokenizer with the one that a checkpoint keeps.

    What counts is which text each id stands for. Two files may differ in their bytes alone, as when a tokenizer was
    trained again from the same text under another path.

    Args:
        data: the flags that name the run's tokenizer.
        tokenizer: the run's.
        checkpoint: folder of the checkpoint that the run goes on from.

    Raises:
        UserError: an id stands for another piece, or there are more or fewer of them, or the checkpoint has none.
    """
    folder = checkpoint / TOKENIZER_FOLDER
    compare_tokenizers(data, tokenizer, load_saved_tokenizer(folder), folder)


def compare_tokenizers(data: DataConfig, tokenizer: Tokenizer, saved: Tokenizer, folder: Path) -> None:
    """Compare a run's tokenizer with another one, which lies in `folder`.

    Raises:
        UserError: an id stands for another piece, or there are more or fewer of them.
    """
    if saved.fingerprint == tokenizer.fingerprint:
        return
    flag = "--tokenizer-type NullTokenizer"
    if data.tokenizer_model is not None:
        flag = f"--tokenizer-model {data.tokenizer_model}"
    ours, theirs = tokenizer.pieces, saved.pieces
    if len(ours) != len(theirs):
        problem = f"has {len(ours)} pieces, that of the checkpoint {folder} has {len(theirs)}"
    elif ours != theirs:
        index = next(index for index, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        problem = f"id {index} is {ours[index]!r}, in that of the checkpoint {folder} it is {theirs[index]!r}"
    elif tokenizer.eod != saved.eod:
        problem = f"documents end with id {tokenizer.eod}, in that of the checkpoint {folder} with {saved.eod}"
    else:
        return
    raise UserError(f"{flag}: {problem}; give the tokenizer the run was trained with")
