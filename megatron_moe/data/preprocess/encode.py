"""Texts to what is written: ids of one type, lengths of sequences, sequences of documents, counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.indexed import token_dtype
from megatron_moe.data.preprocess.job import Preprocessing, Totals
from megatron_moe.data.preprocess.sentences import split_sentences
from megatron_moe.data.tokenizer.kinds.protocol import IdBatch, Tokenizer

# Texts given to a tokenizer at a time; each becomes an object of its own on the way.
_TEXTS = 1 << 16


@dataclass(frozen=True)
class Encoded:
    """Documents as they are stored; empty ones are left out.

    Attributes:
        tokens: [sum(lengths)] ids in the pair's dtype.
        lengths: [sequences] tokens of each.
        documents: [documents] sequences of each.
        written: [texts] which of the texts are documents, not empty.
        totals: counts.
    """

    tokens: npt.NDArray[np.integer]
    lengths: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int32]
    written: npt.NDArray[np.bool_]
    totals: Totals


def encode_texts(texts: Sequence[str], tokenizer: Tokenizer, job: Preprocessing) -> Encoded:
    """Tokenize documents: sentences where asked for, cut to the maximum length, ended.

    As in Megatron-LM's script a sequence without a token is left out, and the end of a document belongs to its last
    sequence.
    """
    sentences = [split_sentences(text) for text in texts] if job.split_sentences else [[text] for text in texts]
    ids, lengths = _encode(list(chain.from_iterable(sentences)), tokenizer)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        raise UserError(f"the tokenizer gave id {int(ids.max())}, but has only {tokenizer.vocab_size}")
    counts = np.fromiter(map(len, sentences), np.int64, len(sentences))
    owner = np.repeat(np.arange(len(texts)), counts)
    room = None if job.max_length is None else job.max_length - job.append_eod
    before = _tokens_of_documents(lengths, counts)
    if room is not None and before.size and int(before.max()) > room:
        ids, lengths = _cut(ids, lengths, counts, owner, room)
    kept = lengths > 0
    owner, lengths = owner[kept], lengths[kept]
    counted = np.bincount(owner, minlength=len(texts))
    written = counted > 0
    sequences = counted[written].astype(np.int32)
    if job.append_eod and sequences.size:
        lengths[np.cumsum(sequences) - 1] += 1
        ids = _with_ends(ids, lengths, sequences, tokenizer.eod)
    cut = np.maximum(before - room, 0) if room is not None else np.zeros_like(before)
    if not written.all():
        texts = [text for text, is_written in zip(texts, written, strict=True) if is_written]
    text = "".join(texts)
    return Encoded(
        tokens=ids.astype(token_dtype(tokenizer.vocab_size)),
        lengths=lengths,
        documents=sequences,
        written=written,
        totals=Totals(
            documents=len(sequences),
            empty=len(written) - len(sequences),
            sequences=len(lengths),
            tokens=len(ids),
            cut_documents=int((cut > 0).sum()),
            cut_tokens=int(cut.sum()),
            characters=len(text),
            text_bytes=len(text.encode("utf-8")),
        ),
    )


def _encode(texts: list[str], tokenizer: Tokenizer) -> IdBatch:
    """`encode_batch` of some texts at a time: a long document may have a million sentences."""
    if len(texts) <= _TEXTS:
        return tokenizer.encode_batch(texts)
    batches = [tokenizer.encode_batch(texts[start : start + _TEXTS]) for start in range(0, len(texts), _TEXTS)]
    ids, lengths = zip(*batches, strict=True)
    return np.concatenate(ids), np.concatenate(lengths)


def _tokens_of_documents(lengths: npt.NDArray[np.int32], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    last = np.cumsum(counts)
    return ends[last] - ends[last - counts]


def _cut(
    ids: npt.NDArray[np.int32],
    lengths: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
    owner: npt.NDArray[np.int64],
    room: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """The first `room` ids of every document, and how long that leaves its sequences."""
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    of_document = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[np.cumsum(counts) - counts]
    left = np.clip(room - (starts - of_document[owner]), 0, lengths)
    place = np.arange(len(ids)) - np.repeat(starts, lengths)
    return ids[place < np.repeat(left, lengths)], left.astype(np.int32)


def _with_ends(
    ids: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], sequences: npt.NDArray[np.int32], eod: int
) -> npt.NDArray[np.int32]:
    """The ids with one more after every document; `lengths` counts it already."""
    result = np.empty(int(lengths.sum(dtype=np.int64)), np.int32)
    is_end = np.zeros(len(result), bool)
    is_end[np.cumsum(lengths, dtype=np.int64)[np.cumsum(sequences) - 1] - 1] = True
    result[is_end] = eod
    result[~is_end] = ids
    return result
