"""Flags of the grouped dispatcher: what is refused, and in which words."""

from typing import Any

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.dispatch import _exchanging
from megatron_moe.config.validate import validate
from tests.helpers.tiny import tiny_run

GROUPED = {"moe_token_dispatcher_type": "grouped"}
FOUR = GROUPED | {"expert_model_parallel_size": 4, "num_experts": (4, 8)}


@pytest.mark.parametrize(
    ("flags", "world", "message"),
    [
        ({"ranks_per_node": 2}, 2, "--ranks-per-node 2: needs --moe-token-dispatcher-type grouped"),
        ({"ranks_per_node": 2, "moe_token_dispatcher_type": "allgather"}, 2, "--ranks-per-node 2: needs"),
        (
            GROUPED
            | {"mlp_type": "standard", "moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
            1,
            "--moe-token-dispatcher-type grouped: sends no padding",
        ),
        (
            FOUR | {"ranks_per_node": 3},
            4,
            r"--ranks-per-node 3: puts 3, 1 of 4 ranks that exchange tokens on their nodes; .* with --ranks-per-node "
            r"1, 2, 4$",
        ),
        # The second four of eight ranks.
        (FOUR | {"ranks_per_node": 5, "micro_batch_size": 1}, 8, "--ranks-per-node 5: puts 1, 3 of 4 .* 1, 2, 4, 8$"),
        # Every second rank of 8.
        (
            FOUR | {"tensor_model_parallel_size": 2, "ranks_per_node": 3},
            8,
            "--ranks-per-node 3: puts 2, 1, 1 of 4 ranks",
        ),
        # A layer of 2 experts is exchanged among 2 ranks.
        (FOUR | {"num_experts": (2, 8), "ranks_per_node": 3}, 4, "--ranks-per-node 3: puts"),
    ],
)
def test_refused(flags: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(tiny_run(vocab_size=100, **flags), world)


@pytest.mark.parametrize(
    ("flags", "world"),
    [(FOUR | {"ranks_per_node": size}, 4) for size in (1, 2, 4, 8)]
    + [(FOUR | {"tensor_model_parallel_size": 2, "ranks_per_node": size}, 8) for size in (1, 2, 4, 8)]
    + [(GROUPED, 1), (FOUR | {"pipeline_model_parallel_size": 2, "ranks_per_node": 2}, 8)],
)
def test_allowed(flags: dict[str, Any], world: int) -> None:
    validate(tiny_run(vocab_size=100, **flags), world)


def test_who_exchanges_with_whom() -> None:
    run = tiny_run(**FOUR | {"tensor_model_parallel_size": 2, "num_experts": (2, 8)})
    whole = [[0, 2, 4, 6], [1, 3, 5, 7]]
    halves = [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert sorted(_exchanging(run, (0, 2, 0, 8), 8)) == sorted(whole + halves)
    run = tiny_run(**FOUR)
    assert _exchanging(run, (0, 4, 0, 8), 8) == [[0, 1, 2, 3], [4, 5, 6, 7]]
