"""Process groups of all layers are made before any layer, as many on every rank; nodes must be alike."""

import os

import pytest
import torch.distributed as dist

from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.models import start_model
from tests.helpers.tiny import tiny_run

GROUPED = {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "grouped"}


def groups_made() -> int:
    """How many groups this rank has made; torch names the next one after it."""
    from torch.distributed import distributed_c10d

    run = tiny_run(
        vocab_size=64,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=2,
        num_experts=(1, 4),
        moe_token_dispatcher_type="grouped",
    )
    start_model(run)
    # Hangs where ranks have made unequal numbers.
    dist.new_group([0, 3], use_local_synchronization=True) if dist.get_rank() in (0, 3) else None
    return distributed_c10d._world.group_count


def test_every_rank_makes_as_many_groups() -> None:
    """The first stage has a layer with copies of its expert, the second has not."""
    first, second, third, fourth = run_ranks(4, groups_made)
    assert first - 1 == second == third == fourth - 1


def start_on_unequal_nodes() -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2" if os.environ["RANK"] == "0" else "1"
    start_model(tiny_run(vocab_size=64, **GROUPED))


def test_nodes_with_other_numbers_of_processes_are_refused() -> None:
    with pytest.raises(
        RankFailure, match="nodes run 1 to 2 processes; start as many on each, or give --ranks-per-node"
    ):
        run_ranks(2, start_on_unequal_nodes)
