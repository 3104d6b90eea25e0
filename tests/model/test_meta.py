"""Models of published size, built on the meta device: their parameters are the published ones."""

import pytest

from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run, load_recipe
from tests.helpers.distributed import run_ranks

MOS_350M = {"num_layers": 21}, {"num_experts": (32,) * 8 + (64, 64)}
MOS_1_3B = {"num_layers": 21}, {"num_experts": (64,) * 8 + (128, 128)}

# recipe, changes, vocabulary, billions in all, billions outside the experts (None: not published)
PUBLISHED = {
    "PAI 16B": ("pai-gpt-moe-16b", ({}, {}), 50000, 16.353, 1.315),
    "PAI 16B without residual": ("pai-gpt-moe-16b", ({}, {"mlp_type": "standard"}), 50000, 15.95, 0.912),
    "PAI 13B": ("pai-gpt-moe-13b", ({}, {"mlp_type": "standard"}), 50257, 13.15, None),
    "PAI 13B residual": ("pai-gpt-moe-13b", ({}, {"mlp_type": "residual"}), 50257, 13.25, None),
    "125M MoE-64": ("gpt-125m-moe64", ({}, {}), 50257, 1.911, None),
    "350M PR-MoE": ("pr-moe-350m", ({}, {}), 50257, 4.117, None),
    "350M MoS": ("pr-moe-350m", MOS_350M, 50257, 3.542, None),
    "1.3B PR-MoE": ("pr-moe-1.3b", ({}, {}), 50257, 31.39, None),
    "1.3B MoS": ("pr-moe-1.3b", MOS_1_3B, 50257, 26.94, None),
    "Qwen3-30B-A3B": ("qwen3-moe-30b-a3b", ({}, {}), 151936, 30.53, None),
}


def published_run(name: str) -> RunConfig:
    recipe, (model, moe), vocabulary, _, _ = PUBLISHED[name]
    # The published counts are those of the vocabulary as it is, so nothing is padded.
    exact = {"vocab_size": vocabulary, "make_vocab_size_divisible_by": 1}
    return build_run(load_recipe(recipe), {"model": {**model, **exact}, "moe": moe})


def built_counts(runs: dict[str, RunConfig]) -> dict[str, tuple[int, int]]:
    from megatron_moe.model.meta import count_on_meta

    built = {name: count_on_meta(run) for name, run in runs.items()}
    return {name: (counts.total, counts.non_expert) for name, counts in built.items()}


@pytest.fixture(scope="module")
def counts() -> dict[str, tuple[int, int]]:
    return run_ranks(1, built_counts, {name: published_run(name) for name in PUBLISHED})[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_model_has_the_published_parameters(name: str, counts: dict[str, tuple[int, int]]) -> None:
    *_, total, non_expert = PUBLISHED[name]
    digits = len(str(total).split(".")[1])
    assert round(counts[name][0] / 1e9, digits) == total
    if non_expert is not None:
        # Published rounded down: 1.3157 B reads 1.315 B.
        assert counts[name][1] / 1e9 == pytest.approx(non_expert, abs=1e-3)
