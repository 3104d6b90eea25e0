"""The choice of a token: who may be chosen, how often, and that it can be repeated."""

import pytest
import torch

from megatron_moe.config.base import ConfigError
from megatron_moe.inference.options import SamplingOptions
from megatron_moe.inference.sampling import choose_tokens, draw, keep_likely, row_generator

PROBS = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1], dtype=torch.float64)
DRAWS = 20_000
# Three standard deviations of a share of 0.4 or 0.6 among that many draws.
TOLERANCE = 0.011


def shares(options: SamplingOptions) -> list[float]:
    """How often each token is chosen."""
    generator = row_generator(1, 0, 0)
    uniforms = torch.rand(DRAWS, generator=generator, dtype=torch.float64)
    chosen = choose_tokens(PROBS.log().expand(DRAWS, -1), options, uniforms)
    return (torch.bincount(chosen, minlength=5) / DRAWS).tolist()


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        (SamplingOptions(), PROBS),
        (SamplingOptions(temperature=0.5), PROBS**2),
        (SamplingOptions(temperature=2.0), PROBS**0.5),
        (SamplingOptions(top_k=2), [0.0, 0.4, 0.0, 0.3, 0.0]),
        (SamplingOptions(top_k=1), [0.0, 1.0, 0.0, 0.0, 0.0]),
        (SamplingOptions(top_k=99), PROBS),
        (SamplingOptions(top_p=0.8), [0.15, 0.4, 0.0, 0.3, 0.0]),
        (SamplingOptions(top_p=0.1), [0.0, 1.0, 0.0, 0.0, 0.0]),
        (SamplingOptions(top_p=1.0), PROBS),
        # Among the two that top-k leaves, 0.4 / 0.7 < 0.6: both stay.
        (SamplingOptions(top_k=2, top_p=0.6), [0.0, 0.4, 0.0, 0.3, 0.0]),
        (SamplingOptions(top_k=2, top_p=0.5), [0.0, 1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_are_chosen_as_often_as_they_are_probable(options: SamplingOptions, weights: object) -> None:
    expected = torch.as_tensor(weights, dtype=torch.float64)
    found = shares(options)
    assert found == pytest.approx((expected / expected.sum()).tolist(), abs=TOLERANCE)
    assert [share > 0 for share in found] == (expected > 0).tolist()


@pytest.mark.parametrize("options", [SamplingOptions(greedy=True), SamplingOptions(temperature=0.0)])
def test_greedy_takes_the_most_probable(options: SamplingOptions) -> None:
    assert choose_tokens(PROBS.expand(3, -1), options).tolist() == [1, 1, 1]


def test_equally_probable_tokens_fill_top_k_and_no_more() -> None:
    kept = keep_likely(torch.full((1, 10), 0.1, dtype=torch.float64), 3, None)
    assert int((kept > 0).sum()) == 3


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_extreme_numbers_choose_a_possible_token(uniform: float) -> None:
    options = SamplingOptions(top_k=2)
    chosen = choose_tokens(PROBS.log().unsqueeze(0), options, torch.tensor([uniform], dtype=torch.float64))
    assert chosen.item() in (1, 3)


def test_generators_differ_by_seed_prompt_and_sample() -> None:
    keys = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]
    numbers = [draw(row_generator(*key)) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert numbers == [draw(row_generator(*key)) for key in keys]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "--temperature -1.0: must be at least 0"),
        ({"top_k": 0}, "--top-k 0: must be at least 1"),
        ({"top_p": 0.0}, "--top-p 0.0: must be greater than 0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"greedy": True, "temperature": 0.7}, "--temperature 0.7: does not go with --greedy"),
        ({"greedy": True, "top_k": 5}, "--top-k 5: does not go with --greedy"),
        ({"temperature": 0.0, "top_p": 0.5}, "--top-p 0.5: does not go with --greedy"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_illegal_options(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplingOptions(**values)
