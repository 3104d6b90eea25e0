"""A pair as a person can read it: what it holds, and documents as text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_moe.config.base import UserError
from megatron_moe.data.domains import Domains, has_domains, read_domains
from megatron_moe.data.indexed import bin_path
from megatron_moe.data.indexed_stream import PairReader
from megatron_moe.data.tokenizer.load import Tokenizer

_FLAG = "inspect"
# Documents looked at for whether they end with the end of a document: reading all would be reading the pair.
_LOOKED_AT = 1000
_CHARACTERS = 400


def inspect(
    prefix: Path, tokenizer: Tokenizer | None, documents: Sequence[int], first: int, characters: int = _CHARACTERS
) -> Iterator[str]:
    """Lines that show a pair.

    Args:
        prefix: of the pair.
        tokenizer: the one that made it; without it ids are shown.
        documents: numbers of documents to show whole.
        first: how many from the beginning to show, each up to `characters`.
        characters: see `first`.

    Raises:
        UserError: the pair is missing or damaged, has no such document, or is of another tokenizer.
    """
    with PairReader(prefix, _FLAG) as pair:
        header = pair.header
        tokens = bin_path(prefix).stat().st_size // header.dtype.itemsize
        yield (
            f"{prefix}: {header.documents:,} documents, {header.sequences:,} sequences, {tokens:,} tokens of "
            f"{header.dtype} ({tokens * header.dtype.itemsize:,} bytes)"
        )
        domains = read_domains(prefix, header.documents, _FLAG) if has_domains(prefix) else None
        if domains is not None:
            shares = zip(domains.names, domains.documents, strict=True)
            yield "domains: " + ", ".join(f"{number} {name} ({count:,})" for number, (name, count) in enumerate(shares))
        if header.sequences != header.documents:
            yield f"documents are divided into sequences: {header.sequences / max(1, header.documents):.2f} each"
        if tokenizer is not None:
            yield _ends(pair, tokenizer)
        for index in documents:
            if not 0 <= index < header.documents:
                raise UserError(f"--document {index}: {prefix} holds documents 0 to {header.documents - 1}")
            yield from _show(pair, index, tokenizer, None, domains)
        for index in range(min(first, header.documents)):
            yield from _show(pair, index, tokenizer, characters, domains)


def _ends(pair: PairReader, tokenizer: Tokenizer) -> str:
    """Whether documents end with the end of a document, in a sample spread over the pair."""
    documents = pair.header.documents
    chosen = np.unique(np.linspace(0, documents - 1, min(_LOOKED_AT, documents), dtype=np.int64))
    ended = inside = 0
    for index in chosen.tolist():
        ids = [token for sequence in pair.document(index) for token in sequence.tolist()]
        highest = max(ids, default=0)
        if highest >= tokenizer.vocab_size:
            raise UserError(
                f"{pair.where}: document {index} holds token id {highest}, but the vocabulary has "
                f"{tokenizer.vocab_size}; it was made with another tokenizer"
            )
        ended += bool(ids) and ids[-1] == tokenizer.eod
        inside += tokenizer.eod in ids[:-1]
    text = f"end of document (id {tokenizer.eod}): at the end of {ended:,} of {len(chosen):,} documents looked at"
    return text + (f", and inside {inside:,}" if inside else "")


def _show(
    pair: PairReader, index: int, tokenizer: Tokenizer | None, characters: int | None, domains: Domains | None
) -> Iterator[str]:
    sequences = [sequence.tolist() for sequence in pair.document(index)]
    sizes = ", ".join(str(len(sequence)) for sequence in sequences)
    domain = "" if domains is None else f" of {domains.names[int(domains.ids[index])]}"
    yield f"\n--- document {index}{domain}: {sum(map(len, sequences)):,} tokens" + (
        f" in sequences of {sizes}" if len(sequences) > 1 else ""
    )
    for sequence in sequences:
        if tokenizer is None:
            text = " ".join(map(str, sequence))
        else:
            text = tokenizer.decode(sequence) + (" <end of document>" if sequence[-1:] == [tokenizer.eod] else "")
        if characters is not None and len(text) > characters:
            text = f"{text[:characters]} ... ({len(text) - characters:,} more characters)"
        yield text
