"""The order of samples: a permutation in every epoch, another each time, and no matter of how many are read."""

import numpy as np
import pytest
from megatron.core.datasets import helpers

from megatron_moe.data.sample_order import EpochOrder, permute, round_keys
from megatron_moe.data.sample_stream import blend_order, change_of_data


@pytest.mark.parametrize("size", [*range(1, 40), 63, 64, 65, 99, 100, 101, 1000, 4095, 4096, 4097])
def test_every_epoch_holds_every_sample_once(size: int) -> None:
    order = EpochOrder(size, seed=7, file=0)
    for epoch in range(4):
        places = [order.locate(epoch * size + place) for place in range(size)]
        assert {found for found, _ in places} == {epoch}
        assert sorted(sample for _, sample in places) == list(range(size))


def test_the_first_epoch_is_the_index_s_own_order() -> None:
    assert [EpochOrder(50, 1, 0).locate(place)[1] for place in range(50)] == list(range(50))


def test_orders_of_a_huge_file_cost_no_memory_and_stay_in_range() -> None:
    size = 10**12 + 7
    keys = round_keys(1, 0, 1)
    found = {permute(place, size, keys) for place in range(5000)} | {
        permute(size - 1 - place, size, keys) for place in range(5000)
    }
    assert len(found) == 10_000
    assert 0 <= min(found) < size // 1000
    assert size - size // 1000 < max(found) < size


def orders(size: int, count: int) -> np.ndarray:
    """[count, size] the orders of epochs 1, 2, ..."""
    return np.array([[permute(p, size, round_keys(3, 0, e)) for p in range(size)] for e in range(1, count + 1)])


def test_places_are_hit_evenly() -> None:
    """Chi-square over epochs of which sample comes first, and of which follows which; small files and odd sizes too."""
    for size in (5, 8, 13):
        drawn = orders(size, 2000)
        for column in (0, size // 2, size - 1):
            counts = np.bincount(drawn[:, column], minlength=size)
            assert chi_square(counts) < 40, (size, column)
        steps = (np.diff(drawn, axis=1) % size).ravel()
        counts = np.bincount(steps, minlength=size)[1:]
        assert chi_square(counts) < 60, (size, counts)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_epochs_files_and_seeds_have_orders_that_are_not_alike() -> None:
    size = 2000
    found = [
        np.array([permute(place, size, round_keys(*key)) for place in range(size)])
        for key in ((1, 0, 1), (1, 0, 2), (1, 1, 1), (2, 0, 1))
    ]
    for index, one in enumerate(found):
        # A correlation of random permutations has a standard deviation of 1 / sqrt(size).
        assert abs(np.corrcoef(one, np.arange(size))[0, 1]) < 5 / size**0.5
        for other in found[:index]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / size**0.5
            assert (one == other).sum() < 10


def test_keys_are_the_same_everywhere() -> None:
    """A run may be resumed by another Python on another machine: pinned values."""
    assert [permute(place, 10, round_keys(1234, 0, 1)) for place in range(10)] == [6, 9, 7, 4, 3, 0, 5, 8, 1, 2]


@pytest.mark.parametrize("weights", [(0.8, 0.2), (1.0, 1.0), (5.0, 3.0, 2.0), (1 / 3, 0.1, 0.25, 1e-3, 0.3)])
def test_a_blend_is_megatron_core_s(weights: tuple[float, ...]) -> None:
    length, read = 4096, 3000
    order = blend_order(weights, length)
    files, turns = np.zeros(read, np.int16), np.zeros(read, np.int64)
    shares = [weight / sum(weights) for weight in weights]
    helpers.build_blending_indices(files, turns, shares, len(shares), read, False)
    assert [order.locate(position) for position in range(read)] == list(zip(files, turns, strict=True))


@pytest.mark.parametrize("weights", [(0.8, 0.2), (5.0, 3.0, 2.0), (1 / 3, 0.1, 0.25, 1e-2, 0.3)])
def test_every_file_s_turns_go_on_over_the_seam_of_the_pattern(weights: tuple[float, ...]) -> None:
    order = blend_order(weights, 1 << 10)
    read = 5 * (1 << 10) + 17
    next_turn = [0] * len(weights)
    for position in range(read):
        file, turn = order.locate(position)
        assert turn == next_turn[file]
        next_turn[file] += 1
    shares = np.array(next_turn) / read
    assert np.abs(shares - np.array(weights) / sum(weights)).max() < 1e-3


@pytest.mark.parametrize(
    ("before", "told"),
    [
        ({"--seed": 1, "weights": [0.5, 0.5]}, None),
        ({"--seed": 2, "weights": [0.5, 0.5]}, "--seed (2 before, 1 now)"),
        ({"--seed": 1, "weights": [0.5, 0.25, 0.25]}, "weights (3 before, 2 now)"),
        ({"--seed": 1, "weights": [0.75, 0.25]}, "weights (0.75 before, 0.5 now)"),
        # A checkpoint of another version, or a damaged one.
        ({"weights": [0.5, 0.5]}, "--seed (None before, 1 now)"),
        ({"--seed": 1, "weights": 3}, "weights (3 before, [0.5, 0.5] now)"),
    ],
)
def test_a_change_of_data_is_named(before: dict[str, object], told: str | None) -> None:
    assert change_of_data(before, {"--seed": 1, "weights": [0.5, 0.5]}) == told
