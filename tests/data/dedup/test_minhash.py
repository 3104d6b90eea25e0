"""The sketch against theory: no bias, and the variance of classic MinHash or less, above all for short documents."""

import numpy as np
import pytest

from megatron_moe.data.dedup.config import NearDedup, s_curve
from megatron_moe.data.dedup.minhash import ROUNDS, minhash
from megatron_moe.data.dedup.signatures import band_keys, estimated_jaccard
from megatron_moe.data.dedup.units import U64, Grams

# Elements in the union, elements in both: from one n-gram to thousands, fewer and more than permutations.
SIZES = [(2, 1), (3, 2), (4, 3), (8, 4), (10, 8), (20, 16), (40, 30), (80, 20), (100, 80), (300, 240), (2000, 1600)]


def _grams(sets: list[U64]) -> Grams:
    counts = np.array([len(each) for each in sets], dtype=np.int64)
    hashes = np.concatenate(sets)
    return Grams(hashes, np.repeat(np.arange(len(sets)), counts), counts, np.arange(len(hashes)))


def _pairs(union: int, both: int, count: int, seed: int) -> tuple[Grams, Grams]:
    """Random pairs of sets with this many elements in the union and in both."""
    random = np.random.default_rng(seed)
    left, right = [], []
    for _ in range(count):
        elements = random.integers(0, 1 << 64, size=union, dtype=np.uint64)
        cut = both + (union - both) // 2
        left.append(elements[:cut])
        right.append(np.concatenate([elements[:both], elements[cut:]]))
    return _grams(left), _grams(right)


@pytest.mark.parametrize(("union", "both"), SIZES)
def test_the_estimate_has_no_bias_and_no_more_variance_than_minhash(union: int, both: int) -> None:
    count = min(3000, 400_000 // union)
    left, right = _pairs(union, both, count, seed=union)
    similarity = both / union
    estimates = (minhash(left, 128, 7) == minhash(right, 128, 7)).mean(axis=1)
    error = np.sqrt(similarity * (1 - similarity) / 128)
    # Five standard errors of the mean, and of the standard deviation.
    assert abs(estimates.mean() - similarity) < 5 * error / np.sqrt(count)
    assert estimates.std() < error * (1 + 5 / np.sqrt(2 * count))


def test_the_last_8_bits_give_the_same_estimate() -> None:
    left, right = _pairs(300, 210, 1000, seed=3)
    whole = (minhash(left, 128, 7) == minhash(right, 128, 7)).mean(axis=1)
    bytes_ = [(minhash(side, 128, 7) & np.uint64(255)).astype(np.uint8) for side in (left, right)]
    estimates = estimated_jaccard(bytes_[0], bytes_[1])
    assert abs(estimates.mean() - whole.mean()) < 0.002
    unlike = _pairs(300, 0, 1000, seed=4)
    none = estimated_jaccard(*((minhash(side, 128, 7) & np.uint64(255)).astype(np.uint8) for side in unlike))
    assert abs(none.mean()) < 0.002


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_candidates_follow_the_s_curve(similarity: float) -> None:
    near, count = NearDedup(), 3000
    left, right = _pairs(200, round(200 * similarity), count, seed=11)
    keys = [band_keys(minhash(side, near.permutations, near.seed), near) for side in (left, right)]
    found = (keys[0] == keys[1]).any(axis=1).mean()
    # Permutations of one sketch are a little less independent than the formula assumes, which makes the curve steeper.
    assert abs(found - s_curve(near.bands, near.rows, similarity)) < 0.04


def test_bands_are_independent_of_each_other() -> None:
    # The same least hashes in two bands must not make the same key.
    near = NearDedup(permutations=16, bands=4, rows=4)
    keys = band_keys(np.full((1, 16), 5, dtype=np.uint64), near)
    assert len(set(keys[0].tolist())) == 4


def test_every_bin_is_filled_however_short_the_document() -> None:
    sets = [np.array([7], dtype=np.uint64), np.array([], dtype=np.uint64), np.arange(1, 5, dtype=np.uint64)]
    signature = minhash(_grams(sets), 128, 1)
    empty = np.uint64((1 << 64) - 1)
    assert (signature[[0, 2]] != empty).all()
    assert (signature[1] == empty).all()
    # One throw cannot fill 128 bins with one element, so later throws and the rest are in play.
    assert len(np.unique(signature[0] >> np.uint64(59))) == ROUNDS + 1


def test_a_gram_that_comes_twice_counts_once() -> None:
    once = np.arange(1, 40, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    twice = np.concatenate([once, once[::-1]])
    assert (minhash(_grams([once]), 128, 1) == minhash(_grams([twice]), 128, 1)).all()


def test_the_seed_chooses_other_hashes() -> None:
    left, _ = _pairs(50, 50, 20, seed=1)
    agree = minhash(left, 128, 1) == minhash(left, 128, 2)
    assert agree.mean() < 0.1
