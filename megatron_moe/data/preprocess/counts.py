"""How often each token id occurs in pairs, for routers that map ids to experts by their share of the text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.data.domains import Domains, check_same_names, has_domains, read_domains
from megatron_moe.data.indexed import IndexedFile, open_indexed
from megatron_moe.data.preprocess.report import find_report, read_report

_FLAG = "counts"
# Tokens, or documents, looked at at a time: bounds memory.
_BLOCK = 1 << 22


def count_tokens(prefixes: Sequence[Path], vocab_size: int | None = None) -> npt.NDArray[np.int64]:
    """Counts of all pairs together.

    Args:
        prefixes: of the pairs.
        vocab_size: how many ids the tokenizer has; None: what the reports beside the pairs say.

    Returns:
        [vocab_size]; where the pairs have domains, [domains, vocab_size].

    Raises:
        UserError: a pair is missing or damaged, of another tokenizer, or has other domains than the rest.
    """
    size = vocab_size if vocab_size is not None else _reported_size(prefixes)
    files = [open_indexed(prefix, _FLAG) for prefix in prefixes]
    domains = _domains(files)
    counts = np.zeros((len(domains[0].names) if domains else 1, size), np.int64)
    for number, file in enumerate(files):
        for row, ids in _stretches(file, domains[number] if domains else None):
            highest = int(ids.max(initial=0))
            if highest >= size:
                raise UserError(f"{_FLAG} {file.prefix}: holds token id {highest}, but the vocabulary has {size}")
            counts[row] += np.bincount(ids, minlength=size)
    return counts if domains else counts[0]


def _stretches(file: IndexedFile, domains: Domains | None) -> Iterator[tuple[int, npt.NDArray[np.integer]]]:
    """Ids of a domain (0 where there are none), a block at a time."""
    if domains is None:
        for start in range(0, file.num_tokens, _BLOCK):
            yield 0, file.tokens[start : start + _BLOCK]
        return
    token = 0
    for start in range(0, len(file.lengths), _BLOCK >> 8):
        lengths = file.lengths[start : start + (_BLOCK >> 8)]
        ends = token + np.cumsum(lengths, dtype=np.int64)
        ids_of_documents = domains.ids[start : start + len(lengths)]
        # Neighbours of one domain go together.
        last = np.append(np.flatnonzero(np.diff(ids_of_documents)), len(lengths) - 1)
        for place in last.tolist():
            for begin in range(token, int(ends[place]), _BLOCK):
                yield int(ids_of_documents[place]), file.tokens[begin : min(begin + _BLOCK, int(ends[place]))]
            token = int(ends[place])


def _domains(files: Sequence[IndexedFile]) -> list[Domains]:
    """Of every pair; none where no pair has any."""
    having = [has_domains(file.prefix) for file in files]
    if not any(having):
        return []
    domains = [read_domains(file.prefix, len(file.lengths), _FLAG) for file in files]
    check_same_names(domains, _FLAG)
    return domains


def _reported_size(prefixes: Sequence[Path]) -> int:
    sizes = {prefix: _size_of(prefix) for prefix in prefixes}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{prefix} {size}" for prefix, size in sizes.items())
        raise UserError(f"{_FLAG}: the pairs were made with different tokenizers (vocabularies: {shown})")
    return next(iter(sizes.values()))


def _size_of(prefix: Path) -> int:
    path = find_report(prefix)
    options = None if path is None else read_report(path)["options"]
    size = options.get("vocab_size") if isinstance(options, dict) else None
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"--vocab-size: give it; no report beside {prefix} says how many ids its tokenizer has")
    return size
