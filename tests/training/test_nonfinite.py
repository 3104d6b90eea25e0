"""Steps whose loss or gradients are not finite: skipped and counted on every rank, and after some in a row the end."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from megatron_moe.config.run import RunConfig
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run

EXPERT, PIPELINE = "expert_model_parallel_size", "pipeline_model_parallel_size"
ZERO = {"use_distributed_optimizer": True}
BIASED = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid", "moe_router_topk": 2}


class Outcome(NamedTuple):
    """What a rank saw of a run."""

    error: str
    changed: list[bool]
    """Per step: whether any weight, moment, expert bias, learning rate or update count moved."""
    losses: list[float]
    progress: dict[str, Any]


def fingerprint(trainer: Any) -> list[torch.Tensor]:
    """Copies of all that a step may change."""
    # With overlap a forward pass would bring the weights of other ranks up to date.
    trainer._gather_parameters()
    tensors = [tensor.detach().clone() for chunk in trainer.model for tensor in chunk.parameters()]
    tensors += [
        module.expert_bias.clone()
        for chunk in trainer.model
        for module in chunk.modules()
        if getattr(module, "expert_bias", None) is not None
    ]
    for part in trainer.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            tensors += [parameter.detach().clone() for parameter in group["params"]]
        for state in part.optimizer.state.values():
            tensors += [torch.as_tensor(value).clone() for value in state.values()]
    return [*tensors, torch.tensor(trainer.scheduler.num_steps)]


def poison(trainer: Any, what: str, steps: list[int], rank: int) -> None:
    """Make the loss, or only one gradient, of one rank NaN or inf in the given steps (counted from 1)."""

    def now() -> bool:
        return trainer.progress.step + 1 in steps and torch.distributed.get_rank() == rank

    value = math.inf if "inf" in what else math.nan
    if what.startswith("loss"):
        chunk = trainer.model[-1]
        chunk.register_forward_hook(lambda module, args, output: output * value if now() else output)
        return
    name, parameter = next(
        (name, parameter) for name, parameter in trainer.model[-1].named_parameters() if "experts" in name
    )
    assert name

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if not now():
            return gradient
        # Stacked experts have added theirs up here already, and what autograd hands on is thrown away.
        parameter.main_grad.fill_(value)
        return torch.full_like(gradient, value)

    parameter.register_hook(spoil)


def train_poisoned(run: RunConfig, what: str, steps: list[int], rank: int = 0) -> Outcome:
    from megatron_moe.config.base import UserError
    from megatron_moe.config.validate import validate
    from megatron_moe.runtime.distributed import environment_world_size, start
    from megatron_moe.training.loop import Trainer
    from megatron_moe.training.reporting import Reporter

    validate(run, environment_world_size())
    trainer = Trainer.build(run, start(run.parallel, run.virtual_stages))
    poison(trainer, what, steps, rank)
    last = fingerprint(trainer)
    changed: list[bool] = []
    losses: list[float] = []

    class Recorder(Reporter):
        def step(self, metrics: dict[str, Any], loads: list[Any]) -> None:
            nonlocal last
            now = fingerprint(trainer)
            same = len(now) == len(last) and all(map(torch.equal, now, last))
            changed.append(not same)
            last = now
            losses.append(metrics["lm_loss"])
            super().step(metrics, loads)

    recorder = Recorder(
        trainer.run, first_step=trainer.progress.step, total_steps=trainer.steps, active=trainer.world.is_main
    )
    error = ""
    try:
        trainer.train(recorder)
    except UserError as caught:
        error = str(caught)
    return Outcome(error, changed, losses, vars(trainer.progress))


CASES: dict[str, tuple[int, dict[str, Any], str]] = {
    "NaN loss": (1, {}, "loss nan"),
    "inf loss": (1, {}, "loss inf"),
    "NaN gradient": (1, {}, "gradient nan"),
    "inf gradient, no clipping": (1, {"clip_grad": 0.0}, "gradient inf"),
    "NaN loss, bf16": (1, {"bf16": True}, "loss nan"),
    "NaN loss, fp16": (1, {"fp16": True, "initial_loss_scale": 64.0}, "loss nan"),
    "NaN loss, expert bias": (1, BIASED, "loss nan"),
    "NaN gradient, expert bias": (1, BIASED, "gradient nan"),
    "NaN gradient of one of two ranks": (2, {}, "gradient nan"),
    "NaN gradient of one expert rank, ZeRO": (2, ZERO | {EXPERT: 2}, "gradient nan"),
    "NaN gradient, overlapped ZeRO": (
        2,
        ZERO | {"overlap_grad_reduce": True, "overlap_param_gather": True},
        "gradient nan",
    ),
    "NaN loss of a pipeline": (2, {PIPELINE: 2}, "loss nan"),
    "NaN gradient on the first of two stages": (2, {PIPELINE: 2, "bf16": True}, "gradient nan"),
}


@pytest.mark.parametrize("name", CASES)
def test_step_is_skipped_counted_and_the_run_goes_on(name: str, tiny_data: Path, tmp_path: Path) -> None:
    world_size, flags, what = CASES[name]
    rank = world_size - 1 if what.startswith("loss") else 0
    # A constant learning rate, so that only updates count; few steps are logged, the skipped one among them.
    run = tiny_run(
        **data_flags(tiny_data) | {"train_iters": 5, "save": str(tmp_path), "tensorboard": False} | flags,
    )
    for outcome in run_ranks(world_size, train_poisoned, run, what, [3], rank):
        assert outcome.error == ""
        # One loss for all ranks; the others must have been finite.
        assert outcome.changed == [True, True, False, True, True]
        assert [math.isfinite(loss) for loss in outcome.losses] == [True, True, not what.startswith("loss"), True, True]
        assert outcome.progress["skipped_steps"] == 1
        assert outcome.progress["consumed_samples"] == 5 * 8
        assert outcome.progress["nonfinite_in_a_row"] == 0
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1, 1]
    lost = "lm_loss" if what.startswith("loss") else "grad_norm"
    assert [row[lost] is None for row in rows] == [False, False, True, False, False]


def test_skipped_step_is_logged_whatever_the_interval(tiny_data: Path, tmp_path: Path) -> None:
    flags = {"train_iters": 6, "log_interval": 5, "save": str(tmp_path), "tensorboard": False}
    run_ranks(1, train_poisoned, tiny_run(**data_flags(tiny_data) | flags), "loss nan", [3])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 5, 6]


def test_a_skipped_step_is_one_without_an_update(tiny_data: Path) -> None:
    """The steps before are those of a clean run; the one after starts from their weights, on the next samples."""
    flags = data_flags(tiny_data) | {"train_iters": 4}
    clean = run_ranks(1, train_poisoned, tiny_run(**flags), "loss nan", [])[0]
    hit = run_ranks(1, train_poisoned, tiny_run(**flags), "loss nan", [2])[0]
    assert hit.losses[0] == clean.losses[0]
    assert hit.losses[2] != clean.losses[2]


def test_finite_steps_in_between_start_the_count_again(tiny_data: Path) -> None:
    run = tiny_run(**data_flags(tiny_data) | {"train_iters": 7, "max_nonfinite_steps": 3})
    outcome = run_ranks(1, train_poisoned, run, "loss nan", [2, 3, 5, 6])[0]
    assert outcome.error == ""
    assert outcome.changed == [True, False, False, True, False, False, True]
    assert outcome.progress["skipped_steps"] == 4


@pytest.mark.parametrize("world_size", [1, 4])
def test_too_many_in_a_row_name_steps_and_samples(world_size: int, tiny_data: Path, tmp_path: Path) -> None:
    flags = {"train_iters": 9, "max_nonfinite_steps": 3, "save": str(tmp_path), "save_interval": 1}
    run = tiny_run(**data_flags(tiny_data) | {"tensorboard": False} | flags)
    for outcome in run_ranks(world_size, train_poisoned, run, "loss nan", [3, 4, 5, 6], 0):
        assert outcome.error == (
            "loss is nan at step 5, 3 such steps in a row (--max-nonfinite-steps 3); samples 16 to 39; no weight was "
            "changed since step 2: lower --lr, or look at the data"
        )
        assert outcome.changed == [True, True, False, False, False]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4\n"


def test_one_is_enough_where_it_is_asked_for(tiny_data: Path) -> None:
    run = tiny_run(**data_flags(tiny_data) | {"train_iters": 5, "max_nonfinite_steps": 1})
    outcome = run_ranks(1, train_poisoned, run, "gradient inf", [2])[0]
    assert outcome.error == (
        "gradient norm is inf at step 2; samples 8 to 15; no weight was changed since step 1: lower --lr, or look at "
        "the data"
    )


def test_the_count_goes_on_after_a_resume(tiny_data: Path, tmp_path: Path) -> None:
    flags = data_flags(tiny_data) | {"tensorboard": False, "save": str(tmp_path), "load": str(tmp_path)}
    first = run_ranks(1, train_poisoned, tiny_run(**flags, train_iters=3), "loss nan", [2, 3])[0]
    assert first.error == ""
    second = run_ranks(1, train_poisoned, tiny_run(**flags | {"train_iters": 6}), "loss nan", [4])[0]
    assert second.error.startswith("loss is nan at step 4, 3 such steps in a row")
    assert "samples 8 to 31" in second.error
