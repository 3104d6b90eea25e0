"""Logits, continuations, scores and evaluation under every layout equal those of one process.

Tolerance: fp32. Sums over ranks are taken in another order, which moves a logit of magnitude 10 by about 1e-5. Token
ids are equal, not close: a sampled token differs only if a random number falls within 1e-6 of a boundary.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import run_ranks
from tests.inference.conftest import train
from tests.inference.on_ranks import everything

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
ALL_AT_ONCE = {TENSOR: 2, PIPELINE: 2, EXPERT: 2, EXPERT_TENSOR: 1}

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {TENSOR: 2}),
    "pipeline 2": (2, {PIPELINE: 2}),
    "expert 2": (2, {EXPERT: 2}),
    "tensor 2, pipeline 2, expert 2": (4, ALL_AT_ONCE),
}


@pytest.fixture(scope="module")
def one_process(checkpoint: Path, tiny_data: Path) -> dict[str, Any]:
    return run_ranks(1, everything, checkpoint, tiny_data, {})[0]


def assert_same(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    import numpy as np

    for rank, result in enumerate(results):
        np.testing.assert_allclose(result["logits"], expected["logits"], atol=1e-4)
        assert result["greedy"] == expected["greedy"]
        assert result["sampled"] == expected["sampled"]
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert result["tokens"] == expected["tokens"] == 3 * 4 * 32
        assert len(result["scores"]) == (0 if rank else len(expected["scores"]))
    for scores, reference in zip(results[0]["scores"], expected["scores"], strict=True):
        assert scores == pytest.approx(reference, abs=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, checkpoint: Path, tiny_data: Path, one_process: dict[str, Any]) -> None:
    world_size, sizes = LAYOUTS[name]
    assert_same(run_ranks(world_size, everything, checkpoint, tiny_data, sizes), one_process)


def test_checkpoint_of_several_ranks_is_read_by_one(tmp_path: Path, tiny_data: Path) -> None:
    sizes = {TENSOR: 2, EXPERT: 2, EXPERT_TENSOR: 1}
    # Both ranks hold a copy of the first layer's expert.
    run_dir = train(tmp_path / "run", tiny_data, world_size=2, num_experts=(1, 8), **sizes)
    one = run_ranks(1, everything, run_dir, tiny_data, {})[0]
    assert_same(run_ranks(2, everything, run_dir, tiny_data, {EXPERT: 2}), one)
