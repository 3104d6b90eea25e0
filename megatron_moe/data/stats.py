"""Unigram statistics of token files: what a model that ignores its context would lose, in nats per token."""

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.indexed import IndexedFile, open_indexed

# Tokens counted at a time: bounds memory on files larger than it.
_BLOCK = 1 << 24


def token_counts(prefix: str, vocab_size: int) -> npt.NDArray[np.int64]:
    """[vocab_size] how often each id occurs in a token file.

    Raises:
        UserError: the pair is missing or damaged, or holds an id that the vocabulary lacks.
    """
    source = open_indexed(prefix)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, source.num_tokens, _BLOCK):
        block = source.tokens[start : start + _BLOCK]
        _check_range(source, block, vocab_size)
        counts += np.bincount(block, minlength=vocab_size)
    return counts


def check_token_range(source: IndexedFile, vocab_size: int, blocks: int = 16, block_size: int = 1 << 16) -> None:
    """Spot-check that a token file fits a vocabulary: `blocks` stretches of `block_size` ids, evenly spread.

    A file made with another tokenizer nearly always shows an id out of range there; reading all of a large
    file would take as long as training on it.

    Raises:
        UserError: an id is not below `vocab_size`.
    """
    last = max(0, source.num_tokens - block_size)
    for start in np.unique(np.linspace(0, last, blocks, dtype=np.int64)):
        _check_range(source, source.tokens[start : start + block_size], vocab_size)


def unigram_entropy(prefix: str, vocab_size: int) -> float:
    """Entropy of a token file's own id frequencies: the least loss of any fixed distribution on it."""
    counts = token_counts(prefix, vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def unigram_cross_entropy(train_prefix: str, heldout_prefix: str, vocab_size: int) -> float:
    """Loss on held-out tokens of the id frequencies of the training tokens, each count one more than it is.

    A model whose held-out loss is well below has learned from context.
    """
    train = token_counts(train_prefix, vocab_size) + 1
    heldout = token_counts(heldout_prefix, vocab_size)
    log_probabilities = np.log(train / train.sum())
    return float(-(heldout * log_probabilities).sum() / heldout.sum())


def _check_range(source: IndexedFile, ids: npt.NDArray[np.integer], vocab_size: int) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise UserError(
            f"{source.prefix}.bin: holds token id {wrong}, but the vocabulary has {vocab_size}; it was made "
            "with another tokenizer"
        )
