"""`base`: a balanced assignment in training and the best score elsewhere, weighed by the sigmoid of the score."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.config.base import ConfigError
from megatron_moe.config.validate import validate
from megatron_moe.moe.assignment import balanced_assignment
from megatron_moe.moe.inputs import RoutingInputs
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained
from tests.helpers.sharing import (
    LAYOUTS,
    Compared,
    E,
    N,
    Routes,
    assert_equals_the_loop,
    assert_layout_agrees,
    assert_resumes_bit_for_bit,
    build_layer,
    compare,
    one_process,
    resume,
    start,
)
from tests.helpers.tiny import tiny_run

FLAGS: dict[str, Any] = {"router": "base"}
CASES: dict[str, dict[str, Any]] = {
    "divides": {},
    "does not divide": {"num_experts": (5,)},
    "more experts than tokens": {"num_experts": (40,)},
    "one expert": {"num_experts": (1,)},
    "allgather, fp64": {"moe_token_dispatcher_type": "allgather", "moe_router_dtype": "fp64"},
}


def naive_routes(score_NE: Tensor, experts: list[int]) -> Routes:
    return [[(expert, 1 / (1 + torch.exp(-score[expert])))] for score, expert in zip(score_NE, experts, strict=True)]


def compare_all() -> dict[str, Compared]:
    start()
    results = {}
    for name, flags in CASES.items():

        def balanced(score_NE: Tensor, _: RoutingInputs) -> Routes:
            return naive_routes(score_NE, balanced_assignment(score_NE).tolist())

        def greedy(score_NE: Tensor, _: RoutingInputs) -> Routes:
            return naive_routes(score_NE, score_NE.argmax(dim=1).tolist())

        layer = build_layer(**FLAGS | flags)
        results[name] = compare(layer, balanced)
        results[f"{name}, evaluation"] = compare(layer.eval(), greedy)
    return results


@pytest.fixture(scope="module")
def compared() -> dict[str, Compared]:
    return run_ranks(1, compare_all)[0]


@pytest.mark.parametrize("name", CASES)
def test_equals_a_loop(name: str, compared: dict[str, Compared]) -> None:
    result = compared[name]
    assert_equals_the_loop(result)
    experts = CASES[name].get("num_experts", (E,))[0]
    assert set(result.load[:-2]) <= {N // experts, -(-N // experts)}
    assert sum(result.load[:-2]) == N
    assert result.load[-2:] == [0, 0]


@pytest.mark.parametrize("name", CASES)
def test_takes_the_best_score_outside_of_training(name: str, compared: dict[str, Compared]) -> None:
    result = compared[f"{name}, evaluation"]
    assert {key: error for key, error in result.errors.items() if not error < 5e-6} == {}
    assert sum(result.load) == 0, "evaluation is not counted"
    if name == "divides":
        assert result.expected_load != compared[name].expected_load


# ---- runs


@pytest.fixture(scope="module")
def alone(tiny_data: Path) -> Trained:
    return one_process(tiny_data, FLAGS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, alone: Trained, tiny_data: Path) -> None:
    assert alone.loads == {2: [64] * 4, 4: [32] * 8}
    assert_layout_agrees(layout, alone, tiny_data, FLAGS)


def test_resumes_bit_for_bit(tiny_data: Path, tmp_path: Path) -> None:
    assert_resumes_bit_for_bit(resume(tiny_data, tmp_path, FLAGS | {"bf16": True}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"moe_router_topk": 2}, "--moe-router-topk 2: must be 1 with --router base"),
        ({"moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor 1.0: has no meaning for --router base"),
        ({"moe_aux_loss_coeff": 0.1}, "--moe-aux-loss-coeff 0.1: has no meaning for --router base"),
        ({"moe_z_loss_coeff": 0.1}, "--moe-z-loss-coeff 0.1: has no meaning for --router base"),
        (
            {"moe_router_score_function": "sigmoid"},
            "--moe-router-score-function sigmoid: has no meaning for --router base",
        ),
        ({"router_cutoff_decay": 0.5}, "--router-cutoff-decay 0.5: belongs to --router expert-choice, not to base"),
    ],
)
def test_what_has_no_meaning_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_run(**FLAGS | flags, vocab_size=100, train_iters=1), 1)
