"""Which documents are dropped: the pairs of all bands joined into clusters, of which the first document is kept.

The clusters are found by union-find over one number per document, 4 bytes each, with numpy operations over blocks of
pairs: no object per document or pair. The first document of a cluster, by order of shards and then rows, is kept.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.dedup.config import NearDedup
from megatron_moe.data.dedup.container import read_fields, read_table, table_writer
from megatron_moe.data.dedup.match import KIND as PAIRS
from megatron_moe.data.dedup.match import Shards
from megatron_moe.data.dedup.units import I64

KIND = "drops"
EXACT, NEAR = 1, 2
_PAIRS_AT_ONCE = 1 << 22
_DOCUMENTS_AT_ONCE = 1 << 22
_DROP = np.dtype([("row", "<u4"), ("kept", "<u8"), ("reason", "<u1")])
_PAIR = np.dtype(("<u8", 2))


@dataclass
class DedupReport:
    """What deduplication found."""

    documents: int = 0
    exact: int = 0
    """Dropped because an earlier document has the same text."""
    near: int = 0
    """Dropped because an earlier document is alike."""
    compared_exactly_only: int | None = None
    """Documents with fewer units than an n-gram."""
    clusters: int = 0
    """Sets of two or more documents of which one is kept."""
    largest_cluster: int = 0
    cluster_sizes: dict[str, int] = field(default_factory=dict)
    """How many clusters have 2, 3-4, 5-8, 9-16, ... documents."""
    pairs: dict[str, int] = field(default_factory=dict)
    """How many pairs the exact comparison and each band found."""

    @property
    def kept(self) -> int:
        """Documents that remain."""
        return self.documents - self.exact - self.near

    def as_dict(self) -> dict[str, Any]:
        """For the JSON report."""
        return {**dataclasses.asdict(self), "kept": self.kept}


@dataclass(frozen=True, slots=True)
class Drops:
    """What is dropped from one shard, rows ascending."""

    rows: npt.NDArray[np.uint32]
    kept: npt.NDArray[np.uint64]
    """The document kept instead, shard << 32 | row."""
    reasons: npt.NDArray[np.uint8]
    """EXACT or NEAR."""


def drop_path(output_folder: Path, signature_file: Path) -> Path:
    """Where `decide` writes what is dropped from the shard of a signature file."""
    return output_folder / f"{signature_file.stem}.drop"


def read_drops(path: Path) -> Drops:
    """What is dropped from one shard."""
    pieces = list(read_table(path, KIND, _DROP, 1 << 24))
    rows = np.concatenate(pieces) if pieces else np.zeros(0, _DROP)
    return Drops(rows["row"].copy(), rows["kept"].copy(), rows["reason"].copy())


def decide(
    pair_files: Sequence[Path], signature_files: Sequence[Path], near: NearDedup | None, output_folder: Path
) -> DedupReport:
    """Write one drop file per shard, also for shards of which nothing is dropped.

    Args:
        pair_files: what `match_exact` and `match_band` wrote, in any order: the exact one, every band, or both.
        signature_files: one per shard, in the order of the shards.
        near: what the signature files were made with.
        output_folder: where the drop files go, see `drop_path`.
    """
    shards = Shards.open(signature_files, near)
    if len({drop_path(output_folder, path) for path in signature_files}) != len(signature_files):
        raise UserError(f"{output_folder}: two signature files have the same name, so their drop files would too")
    _check_pair_files(pair_files, shards, near)
    parent = np.arange(shards.documents, dtype=np.uint32 if shards.documents < 1 << 32 else np.uint64)
    exact = np.zeros(shards.documents, dtype=bool)
    report = DedupReport(documents=shards.documents)
    for path in sorted(pair_files, key=_band_order):
        of, count = str(read_fields(path, PAIRS)["of"]), 0
        for pairs in read_table(path, PAIRS, _PAIR, _PAIRS_AT_ONCE):
            later, earlier = shards.unpack(pairs[:, 0]), shards.unpack(pairs[:, 1])
            join(parent, later, earlier)
            count += len(pairs)
            if of == "exact":
                exact[later] = True
        report.pairs[of] = count
    flatten(parent)
    _summarise(parent, exact, report)
    if near:
        report.compared_exactly_only = sum(int((~ok).sum()) for file in shards.files for _, _, ok in file.band(0))
    for path, begin, end in zip(signature_files, shards.begins[:-1], shards.begins[1:], strict=True):
        _write_drops(drop_path(output_folder, path), shards, parent, exact, int(begin), int(end))
    return report


def _band_order(path: Path) -> tuple[bool, int]:
    of = read_fields(path, PAIRS)["of"]
    return (of != "exact", 0 if of == "exact" else int(of))


def _check_pair_files(paths: Sequence[Path], shards: Shards, near: NearDedup | None) -> None:
    """Every file is of these shards and parameters, and no band is missing or given twice."""
    seen: dict[Any, Path] = {}
    for path in paths:
        fields = read_fields(path, PAIRS)
        of = fields["of"]
        if fields["shards"] != shards.fingerprint:
            raise UserError(f"{path}: was made from other signature files; run its matching again")
        if of != "exact" and (near is None or fields["near"] != near.as_dict()):
            raise UserError(f"{path}: was made with other parameters; run its matching again")
        if of in seen:
            raise UserError(f"{path}: holds the pairs of {of}, which {seen[of]} holds too; give each once")
        seen[of] = path
    bands = sorted(of for of in seen if of != "exact")
    if bands and near and bands != list(range(near.bands)):
        missing = min(set(range(near.bands)) - set(bands))
        raise UserError(f"the pairs of band {missing} are missing: match all {near.bands} bands, or none")


def join(parent: npt.NDArray[Any], left: I64, right: I64) -> None:
    """Put both documents of each pair into one cluster; `parent[i] <= i` always, so a root is the first of its cluster.

    Each round hooks the larger root of every pair under the least root that any of its pairs names; rounds end when
    both sides of every pair have the same root.
    """
    while len(left):
        left, right = _root(parent, left), _root(parent, right)
        apart = left != right
        left, right = left[apart], right[apart]
        np.minimum.at(parent, np.maximum(left, right), np.minimum(left, right).astype(parent.dtype))


def _root(parent: npt.NDArray[Any], documents: I64) -> I64:
    """The roots of these documents; their paths are shortened on the way."""
    result = documents
    while True:
        above = parent[result].astype(np.int64)
        if np.array_equal(above, result):
            break
        result = above
    parent[documents] = result.astype(parent.dtype)
    return result


def flatten(parent: npt.NDArray[Any]) -> None:
    """Let every document name its root; in ascending order each block finds the roots of the blocks before it."""
    for begin in range(0, len(parent), _DOCUMENTS_AT_ONCE):
        block = np.arange(begin, min(begin + _DOCUMENTS_AT_ONCE, len(parent)))
        _root(parent, block)


def _summarise(parent: npt.NDArray[Any], exact: npt.NDArray[np.bool_], report: DedupReport) -> None:
    dropped = np.zeros(len(parent), dtype=bool)
    for begin in range(0, len(parent), _DOCUMENTS_AT_ONCE):
        piece = parent[begin : begin + _DOCUMENTS_AT_ONCE]
        dropped[begin : begin + len(piece)] = piece != np.arange(begin, begin + len(piece), dtype=parent.dtype)
    report.exact = int((dropped & exact).sum())
    report.near = int((dropped & ~exact).sum())
    _, copies = np.unique(parent[dropped], return_counts=True)
    report.clusters = len(copies)
    report.largest_cluster = int(copies.max()) + 1 if len(copies) else 0
    # copies + 1 documents: 2, 3-4, 5-8, ...
    classes, how_many = np.unique(np.ceil(np.log2(copies + 1)).astype(np.int64), return_counts=True)
    for exponent, count in zip(classes.tolist(), how_many.tolist(), strict=True):
        name = "2" if exponent == 1 else f"{2 ** (exponent - 1) + 1}-{2**exponent}"
        report.cluster_sizes[name] = count


def _write_drops(
    path: Path, shards: Shards, parent: npt.NDArray[Any], exact: npt.NDArray[np.bool_], begin: int, end: int
) -> None:
    rows = np.flatnonzero(parent[begin:end] != np.arange(begin, end, dtype=parent.dtype))
    table = np.zeros(len(rows), dtype=_DROP)
    table["row"] = rows
    table["kept"] = shards.pack(parent[begin:end][rows].astype(np.int64))
    table["reason"] = np.where(exact[begin:end][rows], EXACT, NEAR)
    with table_writer(path, KIND, {"documents": end - begin, "shards": shards.fingerprint}) as writer:
        writer.add(table)
