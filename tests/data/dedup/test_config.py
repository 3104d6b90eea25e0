"""Limits of the parameters, and the S-curve at known points."""

from typing import Any

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.data.dedup.config import Decontamination, NearDedup, s_curve


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ngram": 0}, "near_dedup: ngram 0: must be between 1 and 64"),
        ({"permutations": 100}, "near_dedup: permutations 100: must be a power of two between 2 and 4096"),
        ({"permutations": 0}, "near_dedup: permutations 0: must be a power of two between 2 and 4096"),
        ({"bands": 0}, "near_dedup: bands 0: must be at least 1"),
        ({"rows": 0}, "near_dedup: rows 0: must be at least 1"),
        ({"bands": 20}, "near_dedup: bands 20 x rows 7 = 140: must be at most the 128 permutations"),
        ({"threshold": 0.0}, "near_dedup: threshold 0.0: must be above 0 and at most 1"),
        ({"seed": -1}, "near_dedup: seed -1: must be between 0 and 2^64 - 1"),
    ],
)
def test_illegal_parameters_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        NearDedup(**fields)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ngram": 65}, "decontamination: ngram 65: must be between 1 and 64"),
        ({"hits": 0}, "decontamination: hits 0: must be at least 1"),
        ({"share": 1.5}, "decontamination: share 1.5: must be between 0 and 1"),
        ({"short": "any"}, "decontamination: short any: must be equal or skip"),
    ],
)
def test_illegal_decontamination_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Decontamination(**fields)
    assert str(error.value) == message


def test_the_s_curve_at_points_known_by_hand() -> None:
    assert s_curve(18, 7, 0.0) == 0.0
    assert s_curve(18, 7, 1.0) == 1.0
    assert s_curve(1, 1, 0.3) == pytest.approx(0.3)
    assert s_curve(2, 2, 0.5) == pytest.approx(1 - (1 - 0.25) ** 2)
