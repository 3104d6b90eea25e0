"""How long the documents of a pair are, and how well they fill training sequences."""

import bisect
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.data.domains import has_domains, read_domains
from megatron_moe.data.indexed_stream import PairReader

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Lengths below it are counted one by one; of longer documents, which are few, every length is kept.
_COUNTED = 1 << 20
_WIDTH = 50


@dataclass(frozen=True)
class Packing:
    """What `--seq-length` does with these documents.

    Attributes:
        seq_length: tokens in a training sample.
        samples: of an epoch as training takes them, documents one after the other.
        tokens_left_over: at the end of the epoch, too few for a sample.
        documents_cut: documents that reach into another sample.
        padding_share: of a batch that gives each document a row of its own and cuts it at `seq_length`.
        rows: rows when whole documents are packed, the longest first into the fullest row with room; longer ones
            than a row are divided.
        row_fill: share of those rows that is tokens.
    """

    seq_length: int
    samples: int
    tokens_left_over: int
    documents_cut: int
    padding_share: float
    rows: int
    row_fill: float


@dataclass(frozen=True)
class Lengths:
    """Lengths of all documents, exactly.

    Attributes:
        values: [L] every length that occurs, from short to long.
        counts: [L] documents of it.
        packing: for a sequence length, where one was given.
    """

    values: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    packing: Packing | None
    domains: tuple[tuple[str, int, int], ...] = ()
    """Name, documents and tokens of every domain."""

    @property
    def documents(self) -> int:
        """How many there are."""
        return int(self.counts.sum())

    @property
    def tokens(self) -> int:
        """In all of them."""
        return int((self.values * self.counts).sum())

    def quantile(self, share: float) -> int:
        """The least length that this share of the documents does not exceed."""
        ends = np.cumsum(self.counts)
        return int(self.values[int(np.searchsorted(ends, share * ends[-1]))])


def measure(prefix: Path, seq_length: int | None = None) -> Lengths:
    """Go once over a pair's index.

    Raises:
        UserError: the pair is missing or damaged.
        ConfigError: `--seq-length` is not positive.
    """
    if seq_length is not None and seq_length < 1:
        raise ConfigError(f"--seq-length {seq_length}: must be at least 1")
    counts = np.zeros(_COUNTED, np.int64)
    long: list[npt.NDArray[np.int64]] = []
    cut = start = 0
    with PairReader(prefix, "stats") as pair:
        domains = read_domains(prefix, pair.header.documents, "stats") if has_domains(prefix) else None
        tokens = np.zeros(0 if domains is None else len(domains.names), np.int64)
        seen = 0
        for lengths in pair.document_lengths():
            if domains is not None:
                np.add.at(tokens, domains.ids[seen : seen + len(lengths)], lengths)
                seen += len(lengths)
            counts += np.bincount(lengths[lengths < _COUNTED], minlength=_COUNTED)
            long.append(lengths[lengths >= _COUNTED])
            if seq_length is not None:
                ends = start + np.cumsum(lengths)
                first = (ends - lengths) // seq_length
                cut += int((first != (np.maximum(ends, ends - lengths + 1) - 1) // seq_length).sum())
                start = int(ends[-1])
    short = np.flatnonzero(counts)
    more, times = np.unique(np.concatenate(long), return_counts=True) if long else (short[:0], short[:0])
    values, numbers = np.concatenate([short, more]), np.concatenate([counts[short], times])
    if not len(values):
        raise UserError(f"stats {prefix}: the pair holds no documents")
    packing = None if seq_length is None else _pack(values, numbers, seq_length, cut)
    by_domain = zip(domains.names, domains.documents, tokens.tolist(), strict=True) if domains is not None else ()
    return Lengths(values, numbers, packing, tuple(by_domain))


def describe(lengths: Lengths) -> str:
    """A page of text: quantiles, a histogram by powers of two, packing."""
    quantiles = "  ".join(f"{share:.0%} {lengths.quantile(share):,}" for share in QUANTILES)
    lines = [
        f"{lengths.documents:,} documents, {lengths.tokens:,} tokens, "
        f"{lengths.tokens / lengths.documents:.1f} tokens a document",
        f"length       min {int(lengths.values[0]):,}  {quantiles}  max {int(lengths.values[-1]):,}",
        *_histogram(lengths),
    ]
    for number, (name, documents, tokens) in enumerate(lengths.domains):
        share = tokens / max(1, lengths.tokens)
        lines.append(f"domain {number} {name}: {documents:,} documents, {tokens:,} tokens ({share:.1%})")
    if (packing := lengths.packing) is not None:
        share = packing.documents_cut / lengths.documents
        lines += [
            f"packing at --seq-length {packing.seq_length:,}",
            f"  as training does: {packing.samples:,} samples without padding, {packing.tokens_left_over:,} tokens "
            f"left over; {packing.documents_cut:,} documents ({share:.1%}) reach into another sample",
            f"  a row a document: {packing.padding_share:.1%} would be padding",
            f"  whole documents packed best-fit: {packing.rows:,} rows, {packing.row_fill:.2%} full",
        ]
    return "\n".join(lines)


def _histogram(lengths: Lengths) -> list[str]:
    """Documents by powers of two of their length."""
    powers = np.ceil(np.log2(np.maximum(lengths.values, 1))).astype(np.int64)
    counts = np.bincount(powers, weights=lengths.counts)
    tokens = np.bincount(powers, weights=lengths.counts * lengths.values)
    lines = []
    for power in range(int(powers[0]), len(counts)):
        bar = "#" * round(_WIDTH * counts[power] / counts.max())
        share = tokens[power] / max(1, lengths.tokens)
        lines.append(f"  to {1 << power:>11,} {int(counts[power]):>13,} {share:>6.1%} of tokens  {bar}")
    return lines


def _pack(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], seq_length: int, cut: int) -> Packing:
    tokens = int((values * counts).sum())
    used = int((np.minimum(values, seq_length) * counts).sum())
    # A sample is predicted from seq_length tokens and needs the one after them (GPTDataset's one extra token).
    samples = max(0, tokens - 1) // seq_length
    rows = best_fit_rows(values, counts, seq_length)
    return Packing(
        seq_length=seq_length,
        samples=samples,
        tokens_left_over=tokens - samples * seq_length,
        documents_cut=cut,
        padding_share=1 - used / (int(counts.sum()) * seq_length),
        rows=rows,
        row_fill=tokens / (rows * seq_length) if rows else 0.0,
    )


def best_fit_rows(values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], seq_length: int) -> int:
    """Rows that best-fit-decreasing packing needs; it works on how many documents have a length, not on each."""
    pieces = np.zeros(seq_length + 1, np.int64)
    for length, count in zip(values.tolist(), counts.tolist(), strict=True):
        pieces[seq_length] += count * (length // seq_length)
        pieces[length % seq_length] += count
    # Rows by the room they have left, and the rooms that occur, in order.
    room = [0] * (seq_length + 1)
    occurring: list[int] = []
    rows = 0
    for length in range(seq_length, 0, -1):
        left = int(pieces[length])
        while left:
            place = bisect.bisect_left(occurring, length)
            if place == len(occurring):
                # Nothing has room: new rows, each with as many documents of this length as go in.
                each = seq_length // length
                full, rest = divmod(left, each)
                rows += full + bool(rest)
                _add_rows(room, occurring, seq_length - each * length, full)
                _add_rows(room, occurring, seq_length - rest * length, int(bool(rest)))
                break
            space = occurring[place]
            taken = min(left, room[space])
            room[space] -= taken
            if not room[space]:
                del occurring[place]
            _add_rows(room, occurring, space - length, taken)
            left -= taken
    return rows


def _add_rows(room: list[int], occurring: list[int], space: int, count: int) -> None:
    if count and space:
        if not room[space]:
            bisect.insort(occurring, space)
        room[space] += count
