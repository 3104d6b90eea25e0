"""Clusters against a plain union-find; the first document is kept; damaged and mismatched files are one-line errors."""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.base import UserError
from megatron_moe.data.dedup import (
    EXACT,
    NEAR,
    NearDedup,
    Signatures,
    Signer,
    decide,
    drop_path,
    match_band,
    match_exact,
    read_drops,
    signature_writer,
)
from megatron_moe.data.dedup.decide import flatten, join
from tests.data.dedup.near_copies import edited, random_documents

CONFIG = NearDedup(permutations=64, bands=8, rows=4, threshold=0.6)


def _signed(folder: Path, shards: Sequence[Sequence[str]], near: NearDedup | None = CONFIG) -> list[Path]:
    paths = []
    for number, texts in enumerate(shards):
        paths.append(folder / f"{number:04d}.sig")
        with signature_writer(paths[-1], near) as writer:
            writer.add(Signer(near).sign(texts))
    return paths


def _matched(folder: Path, files: Sequence[Path], near: NearDedup | None = CONFIG) -> list[Path]:
    paths = [folder / "exact.pairs"]
    match_exact(files, near, paths[0])
    for band in range(near.bands if near else 0):
        assert near is not None
        paths.append(folder / f"band-{band}.pairs")
        match_band(files, band, near, paths[-1])
    return paths


def _drops(folder: Path, files: Sequence[Path]) -> list[tuple[int, int, int, int, int]]:
    """(shard, row, shard kept, row kept, reason) of all documents dropped."""
    found = []
    for shard, path in enumerate(files):
        drops = read_drops(drop_path(folder, path))
        for row, kept, reason in zip(drops.rows.tolist(), drops.kept.tolist(), drops.reasons.tolist(), strict=True):
            found.append((shard, row, kept >> 32, kept & 0xFFFFFFFF, reason))
    return found


@given(st.integers(1, 60), st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=90), st.integers(1, 7))
def test_clusters_are_those_of_a_plain_union_find(count: int, pairs: list[tuple[int, int]], at_once: int) -> None:
    pairs = [(left, right) for left, right in pairs if left < count and right < count]
    plain = list(range(count))
    for left, right in pairs:
        old, new = max(plain[left], plain[right]), min(plain[left], plain[right])
        plain = [new if root == old else root for root in plain]
    parent = np.arange(count, dtype=np.uint32)
    for begin in range(0, len(pairs), at_once):
        block = np.array(pairs[begin : begin + at_once], dtype=np.int64)
        join(parent, block[:, 0], block[:, 1])
    for document in range(count):
        root = document
        while parent[root] != root:
            root = int(parent[root])
        # The plain loop keeps the least member as the name of a cluster, as `join` does.
        assert root == plain[document]


def test_a_long_chain_is_joined_in_blocks() -> None:
    count = 50_000
    order = np.random.default_rng(0).permutation(count - 1)
    parent = np.arange(count, dtype=np.uint32)
    for part in np.array_split(order, 7):
        join(parent, part + 1, part)
    flatten(parent)
    assert not parent.any()


def test_the_first_document_of_a_cluster_is_kept(tmp_path: Path) -> None:
    one, two, three = random_documents(3, 200, seed=1)
    near = edited(one, 0.01, seed=1)
    shards = [[two, near], [one, three, one], [two, "短", "短", near]]
    files = _signed(tmp_path, shards)
    report = decide(_matched(tmp_path, files), files, CONFIG, tmp_path)
    assert _drops(tmp_path, files) == [
        (1, 0, 0, 1, NEAR),
        (1, 2, 0, 1, EXACT),
        (2, 0, 0, 0, EXACT),
        (2, 2, 2, 1, EXACT),
        (2, 3, 0, 1, EXACT),
    ]
    assert (report.documents, report.exact, report.near, report.kept) == (9, 4, 1, 4)
    assert (report.clusters, report.largest_cluster) == (3, 4)
    assert report.cluster_sizes == {"2": 2, "3-4": 1}
    assert report.compared_exactly_only == 2
    assert report.pairs["exact"] == 4
    assert report.as_dict()["kept"] == 4


def test_a_cluster_that_grows_later_still_names_its_first_document(tmp_path: Path) -> None:
    # The first band knows the last two of three documents, the second band the first two.
    near = NearDedup(permutations=4, bands=2, rows=2)
    bands = np.array([[1, 9], [2, 9], [2, 8]], dtype=np.uint64)
    exact = np.arange(6, dtype=np.uint64).reshape(3, 2)
    signatures = Signatures(exact, np.ones(3, np.uint32), bands, np.zeros((3, 4), np.uint8))
    with signature_writer(tmp_path / "a.sig", near) as writer:
        writer.add(signatures)
    files = [tmp_path / "a.sig"]
    decide(_matched(tmp_path, files, near), files, near, tmp_path)
    assert _drops(tmp_path, files) == [(0, 1, 0, 0, NEAR), (0, 2, 0, 0, NEAR)]


def test_exact_deduplication_alone(tmp_path: Path) -> None:
    files = _signed(tmp_path, [["甲", "乙"], [], ["乙", "甲。"]], None)
    report = decide(_matched(tmp_path, files, None), files, None, tmp_path)
    assert _drops(tmp_path, files) == [(2, 0, 0, 1, EXACT)]
    assert report.compared_exactly_only is None


def test_near_deduplication_alone(tmp_path: Path) -> None:
    (text,) = random_documents(1, 100, seed=1)
    files = _signed(tmp_path, [[text, text, "短", "短"]])
    decide(_matched(tmp_path, files)[1:], files, CONFIG, tmp_path)
    assert _drops(tmp_path, files) == [(0, 1, 0, 0, NEAR)]


def test_shards_cut_elsewhere_drop_the_same_documents(tmp_path: Path) -> None:
    base = random_documents(60, 80, seed=9)
    texts = base + [edited(text, 0.02, seed=index) for index, text in enumerate(base)]
    results = []
    for number, cuts in enumerate([[0, 120], [0, 10, 11, 64, 120], [0, 0, 60, 120]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = _signed(folder, [texts[begin:end] for begin, end in pairwise(cuts)])
        decide(_matched(folder, files), files, CONFIG, folder)
        results.append(
            [(cuts[shard] + row, cuts[kept] + kept_row) for shard, row, kept, kept_row, _ in _drops(folder, files)]
        )
    assert results[0] == results[1] == results[2]
    assert len(results[0]) > 40


def test_damaged_pairs_and_drops_are_refused(tmp_path: Path) -> None:
    files = _signed(tmp_path, [["甲", "乙", "甲"]])
    pairs = _matched(tmp_path, files)
    decide(pairs, files, CONFIG, tmp_path)
    drop = drop_path(tmp_path, files[0])
    for path in (pairs[0], drop):
        whole = path.read_bytes()
        for length in range(0, len(whole), 3):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError, match=rf"{path.name}: [^\n]*$"):
                read_drops(path) if path is drop else decide(pairs, files, CONFIG, tmp_path)
        for place in range(len(whole)):
            changed = bytearray(whole)
            changed[place] ^= 1
            path.write_bytes(bytes(changed))
            with pytest.raises(UserError, match=rf"{path.name}: [^\n]*$"):
                read_drops(path) if path is drop else decide(pairs, files, CONFIG, tmp_path)
        path.write_bytes(whole)


def test_pairs_of_other_files_and_missing_bands_are_refused(tmp_path: Path) -> None:
    files = _signed(tmp_path, [["甲", "乙"], ["丙"]])
    pairs = _matched(tmp_path, files)
    with pytest.raises(UserError, match=r"the pairs of band 3 are missing: match all 8 bands, or none"):
        decide([path for path in pairs if path.name != "band-3.pairs"], files, CONFIG, tmp_path)
    with pytest.raises(UserError, match=r"exact\.pairs: holds the pairs of exact, which .* holds too"):
        decide([pairs[0], *pairs], files, CONFIG, tmp_path)
    with pytest.raises(UserError, match=r"was made from other signature files; run its matching again"):
        decide(pairs, files[::-1], CONFIG, tmp_path)
    other = dataclasses.replace(CONFIG, threshold=0.9)
    with pytest.raises(UserError, match=r"band-0\.pairs: was made with other parameters; run its matching again"):
        decide(pairs, files, other, tmp_path)
    with pytest.raises(UserError, match=r"0000\.sig: was made with near .* clean its shard again"):
        decide(pairs, files, dataclasses.replace(CONFIG, ngram=6), tmp_path)
    twin = tmp_path / "twin" / files[0].name
    twin.parent.mkdir()
    twin.write_bytes(files[0].read_bytes())
    with pytest.raises(UserError, match=r"two signature files have the same name"):
        decide(pairs, [files[0], twin], CONFIG, tmp_path)
