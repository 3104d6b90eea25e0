"""Continuations: greedy ones equal the plain way, the batch and the cache change nothing, documents end."""

from pathlib import Path

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.inference.options import SamplingOptions
from megatron_moe.inference.prompts import check_lengths
from tests.helpers.distributed import run_ranks
from tests.inference.conftest import train
from tests.inference.on_ranks import TEXTS, cache_error, greedy_ways, samples, stopped

ROPE = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "num_query_groups": 2,
    "qk_layernorm": True,
    "untie_embeddings_and_output_weights": True,
    "mlp_type": "standard",
    "moe_router_topk": 2,
}


@pytest.fixture(scope="module")
def rope_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    return train(tmp_path_factory.mktemp("rope"), tiny_data, **ROPE)


@pytest.mark.parametrize("name", ["checkpoint", "rope_checkpoint"])
def test_greedy_continuations_do_not_depend_on_batch_or_cache(name: str, request: pytest.FixtureRequest) -> None:
    (ways,) = run_ranks(1, greedy_ways, request.getfixturevalue(name))
    plain = ways.pop("plain")
    assert len({tuple(ids) for ids in plain}) == len(TEXTS), "continuations of different prompts differ"
    assert max(len(set(ids)) for ids in plain) > 4, "a continuation is no single token repeated"
    for way, ids in ways.items():
        assert ids == plain, way


@pytest.mark.parametrize("name", ["checkpoint", "rope_checkpoint"])
def test_logits_with_a_cache_are_those_without(name: str, request: pytest.FixtureRequest) -> None:
    ((error, largest),) = run_ranks(1, cache_error, request.getfixturevalue(name))
    # A few units in the last place of fp32 (6e-8), grown through four layers.
    assert error < 5e-6 * largest


def test_megatrons_own_attention_generates_too(tmp_path: Path, tiny_data: Path) -> None:
    """--attention-backend unfused keeps its matrix, and asks for a generator of random numbers that only training
    seeds."""
    (ways,) = run_ranks(1, greedy_ways, train(tmp_path / "run", tiny_data, attention_backend="unfused"))
    plain = ways.pop("plain")
    for way, ids in ways.items():
        assert ids == plain, way


def test_generation_stops_at_the_end_of_a_document(checkpoint: Path) -> None:
    ((free, ended),) = run_ranks(1, stopped, checkpoint)
    end = free[0].ids[2]
    assert [done.finish_reason for done in free] == ["length"] * len(TEXTS)
    assert ended[0].finish_reason == "stop"
    for before, after in zip(free, ended, strict=True):
        cut = before.ids.index(end) + 1 if end in before.ids else len(before.ids)
        assert after.ids == before.ids[:cut]


def test_samples_depend_on_seed_and_prompt_only(checkpoint: Path) -> None:
    seven, eight = SamplingOptions(seed=7), SamplingOptions(seed=8)
    (alone,) = run_ranks(1, samples, checkpoint, seven)
    ((first), (again), (other)) = (
        run_ranks(1, _several, checkpoint, sampling, 3, size)[0]
        for sampling, size in ((seven, 2), (seven, 5), (eight, 2))
    )
    assert first == again != other
    assert [done.ids for done in first if done.sample == 0] == [done.ids for done in alone]
    assert len({tuple(done.ids) for done in first}) == 3 * len(TEXTS)


def _several(checkpoint: Path, sampling: SamplingOptions, num_samples: int, micro_batch_size: int) -> list:
    return samples(checkpoint, sampling, num_samples=num_samples, micro_batch_size=micro_batch_size)


def test_rows_that_pad_the_embedding_are_never_generated(checkpoint: Path) -> None:
    # So hot that every row is about as probable: of 1200 tokens 48 would be padding.
    (completions,) = run_ranks(1, _several, checkpoint, SamplingOptions(temperature=1e4), 20, 100)
    ids = [index for done in completions for index in done.ids]
    assert len(ids) > 1000
    assert max(ids) < 860
    assert len(set(ids)) > 500


@pytest.mark.parametrize(
    ("length", "new", "message"),
    [
        (40, 9, "--max-new-tokens 9: with the 40 tokens of prompt 2 .* 48 positions .*; give at most 8"),
        (48, 1, "; give a shorter prompt"),
    ],
)
def test_text_beyond_the_last_position_is_refused(length: int, new: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_lengths([[1], list(range(length))], new, 48)
    check_lengths([list(range(48 - new))], new, 48)
