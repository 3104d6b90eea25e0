"""Pairs against a plain dictionary of buckets, with real and made-up signatures; the same for every memory limit."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.config.base import UserError
from megatron_moe.data.dedup import NearDedup, Signatures, Signer, match_band, match_exact, signature_writer
from megatron_moe.data.dedup import match as match_module
from megatron_moe.data.dedup import signatures as signatures_module
from megatron_moe.data.dedup.container import read_table
from tests.data.dedup.near_copies import edited, random_documents

NEAR = NearDedup(permutations=16, bands=4, rows=3, threshold=0.5)
Pair = tuple[tuple[int, int], tuple[int, int]]


def _signatures(
    exact: Sequence[tuple[int, int]], band: Sequence[int], sketch: Sequence[Sequence[int]], grams: Sequence[int]
) -> Signatures:
    """Made-up signatures: all bands have the same keys."""
    keys = np.repeat(np.array(band, dtype=np.uint64)[:, None], NEAR.bands, axis=1)
    return Signatures(
        np.array(exact, dtype=np.uint64),
        np.array(grams, dtype=np.uint32),
        keys,
        np.array(sketch, dtype=np.uint8),
    )


def _write(folder: Path, shards: Sequence[Signatures], near: NearDedup | None = NEAR) -> list[Path]:
    paths = []
    for number, shard in enumerate(shards):
        paths.append(folder / f"{number:04d}.sig")
        with signature_writer(paths[-1], near) as writer:
            writer.add(shard)
    return paths


def _pairs(path: Path) -> list[Pair]:
    pieces = list(read_table(path, "pairs", np.dtype(("<u8", 2)), 3))
    ids = [tuple((int(each) >> 32, int(each) & 0xFFFFFFFF) for each in row) for piece in pieces for row in piece]
    return ids  # type: ignore[return-value]


def _sketch(like: int) -> list[int]:
    return [like] * 16


def test_exact_pairs_name_the_first_of_each_text(tmp_path: Path) -> None:
    texts = [["一", "二", "一", ""], ["三", "二", ""], ["一"]]
    files = _write(tmp_path, [Signer(None).sign(each) for each in texts], None)
    match_exact(files, None, tmp_path / "exact.pairs")
    expected = {((0, 2), (0, 0)), ((2, 0), (0, 0)), ((1, 1), (0, 1)), ((1, 2), (0, 3))}
    assert set(_pairs(tmp_path / "exact.pairs")) == expected
    assert len(_pairs(tmp_path / "exact.pairs")) == len(expected)


def test_half_of_an_exact_key_is_not_enough(tmp_path: Path) -> None:
    # Three documents share the upper 64 bits; two of them the lower ones too.
    keys = [(7, 1), (7, 2), (9, 2), (7, 2)]
    shard = _signatures(keys, [1, 2, 3, 4], [_sketch(0)] * 4, [9] * 4)
    files = _write(tmp_path, [shard])
    match_exact(files, NEAR, tmp_path / "exact.pairs")
    assert _pairs(tmp_path / "exact.pairs") == [((0, 3), (0, 1))]


def test_candidates_unlike_the_first_are_compared_with_each_other(tmp_path: Path) -> None:
    # One bucket: documents of two kinds, and one of its own.
    kinds = [1, 2, 1, 3, 2, 2]
    shard = _signatures([(n, n) for n in range(6)], [5] * 6, [_sketch(kind) for kind in kinds], [9] * 6)
    files = _write(tmp_path, [shard])
    match_band(files, 2, NEAR, tmp_path / "band.pairs")
    assert _pairs(tmp_path / "band.pairs") == [((0, 2), (0, 0)), ((0, 4), (0, 1)), ((0, 5), (0, 1))]


def test_without_verification_a_bucket_is_enough(tmp_path: Path) -> None:
    near = NearDedup(permutations=16, bands=4, rows=3, verify=False)
    shard = _signatures([(n, n) for n in range(3)], [5, 6, 5], [_sketch(n) for n in range(3)], [9] * 3)
    files = _write(tmp_path, [shard], near)
    match_band(files, 0, near, tmp_path / "band.pairs")
    assert _pairs(tmp_path / "band.pairs") == [((0, 2), (0, 0))]


@pytest.mark.parametrize(("agree", "found"), [(8, 0), (9, 1)])
def test_the_threshold_is_of_the_estimated_similarity(agree: int, found: int, tmp_path: Path) -> None:
    # Half of 16 places agree by more than chance from 9 places on: 8/16 estimates 0.498.
    sketches = [_sketch(1), [1] * agree + [2] * (16 - agree)]
    files = _write(tmp_path, [_signatures([(1, 1), (2, 2)], [5, 5], sketches, [9, 9])])
    match_band(files, 0, NEAR, tmp_path / "band.pairs")
    assert len(_pairs(tmp_path / "band.pairs")) == found


def test_documents_without_grams_are_not_candidates(tmp_path: Path) -> None:
    files = _write(tmp_path, [_signatures([(1, 1), (2, 2)], [5, 5], [_sketch(1)] * 2, [0, 0])])
    match_band(files, 0, NEAR, tmp_path / "band.pairs")
    assert _pairs(tmp_path / "band.pairs") == []


def _plain_pairs(shards: Sequence[Signatures], band: int) -> set[Pair]:
    """The rule of `match_band` in plain Python."""
    buckets: dict[int, list[tuple[int, int]]] = {}
    for number, shard in enumerate(shards):
        for row in range(len(shard)):
            if shard.grams[row]:
                buckets.setdefault(int(shard.bands[row, band]), []).append((number, row))
    pairs = set()
    for bucket in buckets.values():
        rest = bucket
        while rest:
            leader, *others = rest
            rest = []
            for other in others:
                agree = (shards[leader[0]].sketch[leader[1]] == shards[other[0]].sketch[other[1]]).mean()
                if (agree - 1 / 256) / (1 - 1 / 256) >= NEAR.threshold:
                    pairs.add((other, leader))
                else:
                    rest.append(other)
    return pairs


@pytest.fixture
def shards() -> list[Signatures]:
    """Real signatures of documents, half of which are copies with some edits, in three uneven shards."""
    base = random_documents(120, 60, seed=5)
    texts = base + [edited(text, 0.02 * (index % 8), seed=index) for index, text in enumerate(base)] + ["短"] * 4
    order = np.random.default_rng(0).permutation(len(texts))
    texts = [texts[index] for index in order]
    return [Signer(NEAR).sign(part) for part in (texts[:31], texts[31:32], texts[32:])]


def test_real_signatures_match_as_in_plain_python(shards: list[Signatures], tmp_path: Path) -> None:
    files = _write(tmp_path, shards)
    for band in range(NEAR.bands):
        match_band(files, band, NEAR, tmp_path / "band.pairs")
        expected = _plain_pairs(shards, band)
        assert len(expected) > 30
        assert sorted(_pairs(tmp_path / "band.pairs")) == sorted(expected)


def test_memory_does_not_change_the_file(
    shards: list[Signatures], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signatures_module, "GROUP", 16)
    files = _write(tmp_path, shards)
    results = set()
    for memory in (1 << 30, 5000, 300, 50):
        match_band(files, 1, NEAR, tmp_path / "band.pairs", memory)
        match_exact(files, NEAR, tmp_path / "exact.pairs", memory)
        results.add((tmp_path / "band.pairs").read_bytes() + (tmp_path / "exact.pairs").read_bytes())
    assert len(results) == 1


def test_memory_does_not_change_the_order_of_pairs(tmp_path: Path) -> None:
    # 40 buckets of 6 documents of two kinds, so that each takes two rounds.
    count = 240
    keys = [int(key) for key in np.random.default_rng(0).integers(1, 1 << 64, size=40, dtype=np.uint64)] * 6
    shard = _signatures([(n, n) for n in range(count)], keys, [_sketch(n // 40 % 2) for n in range(count)], [9] * count)
    files = _write(tmp_path, [shard])
    results = set()
    for memory in (1 << 30, 3000, 1000):
        match_band(files, 1, NEAR, tmp_path / "band.pairs", memory)
        results.add((tmp_path / "band.pairs").read_bytes())
        assert len(_pairs(tmp_path / "band.pairs")) == 40 * 4
    assert len(results) == 1


def test_memory_is_bounded(tmp_path: Path) -> None:
    count = 400_000
    generator = np.random.default_rng(0)
    keys = generator.integers(0, count // 2, size=(count, 1), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    near = NearDedup(permutations=2, bands=1, rows=2)
    shard = Signatures(
        np.concatenate([keys, keys], axis=1), np.ones(count, np.uint32), keys, np.zeros((count, 2), np.uint8)
    )
    files = _write(tmp_path, [shard], near)
    del shard, keys
    peaks = []
    for memory in (1 << 30, 2 << 20):
        for match in (
            lambda memory: match_exact(files, near, tmp_path / "exact.pairs", memory),
            lambda memory: match_band(files, 0, near, tmp_path / "band.pairs", memory),
        ):
            tracemalloc.start()
            match(memory)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    # All at once takes what is said a document; beside a small limit, one group of a file and one block of candidates.
    assert max(peaks[:2]) < count * match_module.BYTES_PER_DOCUMENT
    assert min(peaks[:2]) > 12 << 20
    assert max(peaks[2:]) < 8 << 20


def test_large_buckets_come_in_pieces_with_their_first_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(match_module, "_CANDIDATES_AT_ONCE", 4)
    keys = [3, 1, 3, 3, 3, 2, 3, 3, 1, 3, 3, 3, 3]
    count = len(keys)
    shard = _signatures([(key, 7) for key in keys], keys, [_sketch(1)] * count, [9] * count)
    files = _write(tmp_path, [shard])
    match_band(files, 0, NEAR, tmp_path / "band.pairs")
    match_exact(files, NEAR, tmp_path / "exact.pairs")
    expected = [((0, 8), (0, 1))] + [((0, row), (0, 0)) for row, key in enumerate(keys) if key == 3 and row]
    assert _pairs(tmp_path / "band.pairs") == expected
    assert sorted(_pairs(tmp_path / "exact.pairs")) == sorted(expected)


def test_no_documents_and_no_files(tmp_path: Path) -> None:
    files = _write(tmp_path, [Signer(NEAR).sign([])])
    for inputs in ([], files):
        match_band(inputs, 0, NEAR, tmp_path / "band.pairs")
        match_exact(inputs, NEAR, tmp_path / "exact.pairs")
        assert _pairs(tmp_path / "band.pairs") == _pairs(tmp_path / "exact.pairs") == []


def test_a_band_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="band 4: must be between 0 and 3"):
        match_band([], 4, NEAR, tmp_path / "band.pairs")
