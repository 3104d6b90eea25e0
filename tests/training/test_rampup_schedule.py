"""Warm-up and decay count steps, also while the batch grows."""

from types import SimpleNamespace

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import tiny_run

RAMP = {"rampup_batch_size": (2, 2, 30), "global_batch_size": 8, "micro_batch_size": 2, "train_iters": 12, "lr": 1.0}


def rates(flags: dict[str, object]) -> list[float]:
    """Learning rate of every step of a run."""
    from megatron_moe.training.batches import BatchSchedule
    from megatron_moe.training.optimizer import build_scheduler

    run = tiny_run(**{**RAMP, **flags})
    schedule = BatchSchedule.from_run(run, 1)
    group = {"lr": 0.0, "max_lr": run.optimizer.lr, "min_lr": run.optimizer.min_lr, "wd_mult": 1.0, "lr_mult": 1.0}
    scheduler = build_scheduler(run, SimpleNamespace(param_groups=[group]), schedule, 12)
    seen, consumed = [], 0
    for _ in range(12):
        seen.append(group["lr"])
        samples = schedule.batch_size(consumed)
        consumed += samples
        scheduler.step(increment=samples)
    return [*seen, group["lr"]]


def test_decay_ends_with_the_last_step() -> None:
    linear = run_ranks(1, rates, {"lr_decay_style": "linear"})[0]
    assert linear[0] == 1.0
    assert linear[-1] == pytest.approx(0.0, abs=1e-9)


def test_warm_up_takes_its_steps() -> None:
    warm = run_ranks(1, rates, {"lr_warmup_iters": 4})[0]
    assert warm[4] == pytest.approx(1.0)
    assert warm[3] < 1.0


def test_wsd_decays_over_the_last_steps() -> None:
    stable = run_ranks(1, rates, {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 3, "lr_wsd_decay_style": "linear"})[0]
    assert stable[:10] == [1.0] * 10
    assert stable[10] < 1.0
    assert stable[-1] == pytest.approx(0.0, abs=1e-9)
