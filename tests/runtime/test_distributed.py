"""Starting: the device, groups with and without torchrun, seeds."""

import os
from typing import Any

import pytest
import torch

from megatron_moe.config.base import ConfigError
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.runtime import distributed
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import tiny_run


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("asked", "gpus", "local_rank", "expected"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 0, 3, "cpu"),
        ("cpu", 0, 0, "cpu"),
        ("cpu", 2, 0, "cpu"),
        ("auto", 2, 1, "cuda:1"),
        ("cuda", 2, 0, "cuda:0"),
    ],
)
def test_device(asked: Any, gpus: int, local_rank: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, gpus)
    assert str(distributed.choose_device(ParallelConfig(device=asked), local_rank)) == expected


def test_cuda_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 0)
    with pytest.raises(ConfigError, match="--device cuda: torch sees no GPU here; use --device cpu"):
        distributed.choose_device(ParallelConfig(device="cuda"), 0)


@pytest.mark.parametrize("asked", ["cuda", "auto"])
def test_more_processes_than_gpus_is_an_error(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    with pytest.raises(ConfigError, match="process 2 of this node has no GPU of its own, there are 2"):
        distributed.choose_device(ParallelConfig(device=asked), 2)


def test_world_without_torchrun_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (distributed.environment_rank(), distributed.environment_world_size()) == (0, 1)


def start_alone() -> dict[str, Any]:
    import torch.distributed as dist

    world = distributed.start(ParallelConfig(device="cpu"))
    # Groups that were really set up answer.
    ones = torch.ones(1)
    dist.all_reduce(ones)
    result = {
        "world": (world.rank, world.size, world.is_main, str(world.device)),
        "backend": dist.get_backend(),
        "environment": sorted(name for name in os.environ if name in ("RANK", "MASTER_ADDR", "MASTER_PORT")),
        "sum": float(ones),
    }
    distributed.stop()
    result["stopped"] = not dist.is_initialized()
    distributed.stop()
    return result


def test_one_process_needs_no_torchrun_and_no_store() -> None:
    """No MASTER_ADDR, no store on a port; gloo's own sockets are its business."""
    result = run_ranks(1, start_alone)[0]
    assert result == {
        "world": (0, 1, True, "cpu"),
        "backend": "gloo",
        "environment": [],
        "sum": 1.0,
        "stopped": True,
    }


def sizes_and_worlds() -> list[Any]:
    from megatron.core import parallel_state

    run = tiny_run(tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1)
    world = distributed.start(run.parallel)
    return [
        world.rank,
        world.size,
        world.is_main,
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    ]


def test_groups_have_the_sizes_asked_for() -> None:
    assert run_ranks(4, sizes_and_worlds) == [[rank, 4, rank == 0, 2, 2, 2, 1] for rank in range(4)]


def refuse_world(tensor: int) -> str:
    import torch.distributed as dist

    try:
        distributed.start(ParallelConfig(device="cpu", tensor_model_parallel_size=tensor))
    except ConfigError as error:
        assert not dist.is_initialized()
        return str(error)
    return ""


def test_sizes_that_do_not_fit_are_refused_before_groups_form() -> None:
    for message in run_ranks(2, refuse_world, 4):
        assert message.endswith("= 4: must divide the number of processes, which is 2")


def states() -> list[Any]:
    import random

    import numpy as np

    from megatron_moe.runtime.seeds import capture_states, restore_states, set_seeds

    distributed.start(tiny_run().parallel)

    def draw() -> list[float]:
        from megatron.core import tensor_parallel

        with tensor_parallel.get_cuda_rng_tracker().fork():
            forked = float(torch.rand(1))
        return [random.random(), float(np.random.rand()), float(torch.rand(1)), forked]

    set_seeds(7)
    first = draw()
    kept = capture_states()
    second = draw()
    restore_states(kept)
    again = draw()
    set_seeds(7)
    return [first, second, again, draw()]


def test_every_generator_is_seeded_captured_and_restored() -> None:
    first, second, again, reseeded = run_ranks(1, states)[0]
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert again == second
    assert reseeded == first
