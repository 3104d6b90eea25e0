"""Measures of a load: the ends of their ranges, and values worked out by hand."""

import math

import pytest

from megatron_moe.moe.load import LayerLoad, entropy, imbalance, mean_shares, variation


def test_an_even_load() -> None:
    for experts in (1, 4, 64):
        tokens = [7] * experts
        assert (variation(tokens), entropy(tokens), imbalance(tokens)) == (0.0, pytest.approx(1.0), 1.0)


def test_one_expert_alone() -> None:
    tokens = [0, 12, 0, 0]
    assert (variation(tokens), entropy(tokens), imbalance(tokens)) == (pytest.approx(math.sqrt(3)), 0.0, 4.0)


def test_no_tokens_at_all() -> None:
    assert (variation([0, 0]), entropy([0, 0]), imbalance([0, 0])) == (0.0, 0.0, 0.0)
    assert LayerLoad(1, [0, 0], dropped=0).shares()["dropped_share"] == 0.0


def test_values_by_hand() -> None:
    """3 and 1 of 4: mean 2, deviation 1; entropy 0.811 bits of 1."""
    assert variation([3, 1]) == pytest.approx(0.5)
    assert entropy([3, 1]) == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)


def test_shares_are_of_all_that_was_asked_for() -> None:
    """10 assignments: 8 made, of which 3 with another expert than the router's choice, and 2 dropped."""
    load = LayerLoad(2, [4, 4], dropped=2, recycled=3)
    assert (load.shares()["dropped_share"], load.shares()["recycled_share"]) == (0.2, 0.3)
    means = mean_shares([load, LayerLoad(4, [3, 1, 0, 0], dropped=0)])
    assert means["moe_dropped"] == 0.1
    assert means["moe_recycled"] == 0.15
    assert means["moe_load_cv"] == pytest.approx(math.sqrt(1.5) / 2)
    assert mean_shares([]) == {}
