"""A resumed run goes on bit for bit; under another layout it holds the same weights and goes on within rounding."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from megatron_moe.config.run import RunConfig
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Shard, assemble, shards
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
# A constant rate where steps are taken without the loop: it moves the scheduler.
CONSTANT = {"tensorboard": False}
SCHEDULE = CONSTANT | {"lr_decay_style": "cosine", "lr_warmup_iters": 1, "lr_decay_iters": 6}

SAME_LAYOUT: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "bf16": (1, {"bf16": True}),
    "fp16": (1, {"fp16": True, "initial_loss_scale": 64.0, "loss_scale_window": 2}),
    "SGD": (1, {"optimizer": "sgd"}),
    "SGD without momentum": (1, {"optimizer": "sgd", "sgd_momentum": 0.0}),
    "SGD, bf16": (1, {"optimizer": "sgd", "bf16": True}),
    "expert bias": (
        1,
        {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid", "moe_router_topk": 2},
    ),
    "batch ramp-up": (1, {"rampup_batch_size": (2, 2, 24)}),
    "distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "distributed optimizer, bf16": (2, {"use_distributed_optimizer": True, "bf16": True}),
    "tensor 2": (2, {TENSOR: 2}),
    "pipeline 2, interleaved": (2, {PIPELINE: 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "tensor 2, pipeline 2, expert 2": (4, {TENSOR: 2, PIPELINE: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
    "expert 2, distributed optimizer, bf16": (
        4,
        {EXPERT: 2, "use_distributed_optimizer": True, "bf16": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME_LAYOUT)
def test_same_layout_goes_on_bit_for_bit(name: str, tiny_data: Path, tmp_path: Path) -> None:
    """Three steps, then ten more from the checkpoint, against thirteen at once; with dropout."""
    world_size, layout = SAME_LAYOUT[name]
    flags = data_flags(tiny_data) | DROPOUT | SCHEDULE | {"lr_decay_iters": 13} | layout
    whole = run_ranks(world_size, train_curve, tiny_run(**flags, train_iters=13))[0]
    run_ranks(world_size, train_curve, tiny_run(**flags, train_iters=3, save=str(tmp_path)))
    rest = run_ranks(world_size, train_curve, tiny_run(**flags, train_iters=13, load=str(tmp_path)))[0]
    assert len(rest.losses) == 10
    assert rest.losses == whole.losses[3:]
    assert rest.grad_norms == whole.grad_norms[3:]
    assert rest.loads == whole.loads[3:]


def test_dropout_states_are_what_makes_it_exact(tiny_data: Path, tmp_path: Path) -> None:
    """Without them (--no-load-rng) losses differ: the test above can fail."""
    flags = data_flags(tiny_data) | DROPOUT | SCHEDULE
    whole = run_ranks(1, train_curve, tiny_run(**flags, train_iters=6))[0]
    run_ranks(1, train_curve, tiny_run(**flags, train_iters=3, save=str(tmp_path)))
    other = run_ranks(1, train_curve, tiny_run(**flags, train_iters=6, load=str(tmp_path), no_load_rng=True))[0]
    assert other.losses[0] != whole.losses[3]
    assert other.losses == pytest.approx(whole.losses[3:], rel=0.05)


def test_no_load_optim_starts_the_moments_anew(tiny_data: Path, tmp_path: Path) -> None:
    """The first loss, which depends on weights alone, is the same; what follows is not."""
    flags = data_flags(tiny_data) | SCHEDULE
    whole = run_ranks(1, train_curve, tiny_run(**flags, train_iters=6))[0]
    run_ranks(1, train_curve, tiny_run(**flags, train_iters=3, save=str(tmp_path)))
    run = tiny_run(**flags, train_iters=6, load=str(tmp_path), no_load_optim=True)
    other = run_ranks(1, train_curve, run)[0]
    assert other.losses[0] == whole.losses[3]
    assert other.losses[1:] != whole.losses[4:]
    assert len(other.losses) == 3


def test_finetune_takes_the_weights_only(tiny_data: Path, tmp_path: Path) -> None:
    flags = data_flags(tiny_data) | SCHEDULE
    first = run_ranks(1, train_curve, tiny_run(**flags, train_iters=3, save=str(tmp_path)))[0]
    for precision in ({}, {"bf16": True}):
        run = tiny_run(**flags, **precision, train_iters=2, load=str(tmp_path), finetune=True)
        tuned = run_ranks(1, train_curve, run)[0]
        assert len(tuned.losses) == 2
        assert tuned.losses[0] < first.losses[0] - 0.3, "the same batch, after three steps of learning"


# ---- other layouts

ELSEWHERE: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "expert 2": (2, {EXPERT: 2}),
    "tensor 2, expert tensor 2": (2, {TENSOR: 2}),
    "pipeline 2, interleaved": (2, {PIPELINE: 2, "num_layers_per_virtual_pipeline_stage": 1}),
    "distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "tensor 2, pipeline 2, expert 2": (4, {TENSOR: 2, PIPELINE: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
    "expert 2, distributed optimizer": (4, {EXPERT: 2, "use_distributed_optimizer": True}),
}


class Rest(NamedTuple):
    """How a run goes on: the weights it loads, and the losses and norms of the steps that are left."""

    weights: list[Shard]
    losses: list[float]
    grad_norms: list[float]


def go_on(run: RunConfig) -> Rest:
    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.loop import Trainer
    from megatron_moe.training.step import train_step

    trainer = Trainer.build(run, start(run.parallel, run.virtual_stages))
    rest = Rest(shards(trainer.model), [], [])
    batches = trainer._training_batches()
    for _ in range(trainer.steps - trainer.progress.step):
        count = trainer.schedule.micro_batches(0)
        result = train_step(trainer.run, trainer.model, trainer.optimizer, batches, count)
        rest.losses.append(result.loss)
        rest.grad_norms.append(result.grad_norm)
    return rest


class Saved:
    """A checkpoint of a layout, and how its own run goes on."""

    def __init__(self, folder: Path, flags: dict[str, Any], world_size: int) -> None:
        run_ranks(world_size, train_curve, tiny_run(**flags, train_iters=3, save=str(folder)))
        self.folder = folder
        ranks = run_ranks(world_size, go_on, tiny_run(**flags, load=str(folder), train_iters=13))
        self.weights, self.rest = assemble([rank.weights for rank in ranks]), ranks[0]


@pytest.fixture(scope="module")
def from_four_ranks(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    layout = {TENSOR: 2, PIPELINE: 2, EXPERT: 2, EXPERT_TENSOR: 1}
    return Saved(tmp_path_factory.mktemp("four"), data_flags(tiny_data) | CONSTANT | layout, 4)


@pytest.fixture(scope="module")
def from_sharded_optimizer(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    layout = {EXPERT: 2, "use_distributed_optimizer": True}
    return Saved(tmp_path_factory.mktemp("sharded"), data_flags(tiny_data) | CONSTANT | layout, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "name"),
    [("from_four_ranks", name) for name in ELSEWHERE]
    + [("from_sharded_optimizer", name) for name in ("one process", "tensor 2, pipeline 2, expert 2")]
    + [("from_sharded_optimizer", "distributed optimizer")],
)
def test_any_layout_goes_on_from_any_other(
    name: str, source: str, tiny_data: Path, request: pytest.FixtureRequest
) -> None:
    """Weights bit for bit; ten losses, of which all but the first need the optimizer's state, within rounding.

    Measured: losses 1.2e-7 at most, which is fp32's own step; the tolerance is some twenty times that. Gradient norms
    4.1e-5, in one step of ten, where rounding may move a token between experts of nearly the same score.
    """
    saved: Saved = request.getfixturevalue(source)
    world_size, layout = ELSEWHERE[name]
    run = tiny_run(**data_flags(tiny_data), **CONSTANT, **layout, load=str(saved.folder), train_iters=13)
    ranks = run_ranks(world_size, go_on, run)
    weights = assemble([rank.weights for rank in ranks])
    assert set(weights) == set(saved.weights)
    for key, tensor in saved.weights.items():
        np.testing.assert_array_equal(weights[key], tensor, err_msg=key)
    assert len(saved.rest.losses) == 10
    for rank in ranks:
        assert rank.losses == pytest.approx(saved.rest.losses, rel=2e-6)
        assert rank.grad_norms == pytest.approx(saved.rest.grad_norms, rel=1e-4)


@pytest.mark.slow
def test_masters_are_found_whatever_wrote_them(tiny_data: Path, tmp_path: Path) -> None:
    """bf16: plain optimizer to distributed and back; without its fp32 masters a loss would be off by 1e-3."""
    flags = data_flags(tiny_data) | SCHEDULE | {"bf16": True, "swiglu": True}
    sharded = {"use_distributed_optimizer": True}
    for name, first, second in (("plain", {}, sharded), ("sharded", sharded, {})):
        folder = str(tmp_path / name)
        run_ranks(2, train_curve, tiny_run(**flags, **first, train_iters=3, save=folder))
        same, other = (
            run_ranks(2, train_curve, tiny_run(**flags, **layout, train_iters=6, load=folder))[0]
            for layout in (first, second)
        )
        assert other.losses == pytest.approx(same.losses, rel=1e-5)


def test_learning_rate_may_change(tiny_data: Path, tmp_path: Path) -> None:
    """Upstream finds parameter groups again by their learning rate; flags decide here."""
    flags = data_flags(tiny_data) | {"train_iters": 5, "tensorboard": False}
    run_ranks(1, train_curve, tiny_run(**flags | {"train_iters": 3}, lr=1e-2, save=str(tmp_path)))
    kept, lower = (run_ranks(1, train_curve, tiny_run(**flags, lr=lr, load=str(tmp_path)))[0] for lr in (1e-2, 1e-5))
    assert lower.losses[0] == kept.losses[0]
    assert lower.losses[1] != kept.losses[1]


@pytest.mark.parametrize("sharded", [False, True])
def test_saved_before_the_first_update(sharded: bool, tiny_data: Path, tmp_path: Path) -> None:
    """fp16 skips the first steps until the loss scale fits; a checkpoint of those steps is one as well."""
    flags = data_flags(tiny_data) | {
        "fp16": True,
        "initial_loss_scale": 2.0**22,
        "hysteresis": 1,
        "tensorboard": False,
        "use_distributed_optimizer": sharded,
    }
    whole = run_ranks(1, train_curve, tiny_run(**flags, train_iters=24))[0]
    first = run_ranks(1, train_curve, tiny_run(**flags, train_iters=2, save=str(tmp_path)))[0]
    assert first.skipped == 2
    rest = run_ranks(1, train_curve, tiny_run(**flags, train_iters=24, load=str(tmp_path)))[0]
    assert rest.losses == whole.losses[2:]
    assert rest.skipped == whole.skipped - 2 < 20


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(1, {}), (4, {PIPELINE: 2, EXPERT: 2}), (2, {"use_distributed_optimizer": True})],
    ids=["one process", "pipeline 2, expert 2", "distributed optimizer"],
)
def test_scheduler_and_scaler_go_on_under_another_layout(
    world_size: int, layout: dict[str, Any], tiny_data: Path, tmp_path: Path
) -> None:
    """fp16 with a loss scale that still grows, and a cosine: both are those of an unbroken run at every step.

    Losses differ by fp16's rounding (5e-4), which the order of sums decides.
    """
    flags = data_flags(tiny_data) | SAME_LAYOUT["fp16"][1] | SCHEDULE | {"lr_decay_iters": 13}
    first = {EXPERT: 2}
    run_ranks(2, train_curve, tiny_run(**flags | first, train_iters=13, save=str(tmp_path / "whole")))
    run_ranks(2, train_curve, tiny_run(**flags | first, train_iters=3, save=str(tmp_path / "first")))
    run = tiny_run(**flags | layout, train_iters=13, load=str(tmp_path / "first"), save=str(tmp_path / "rest"))
    run_ranks(world_size, train_curve, run)
    whole, rest = rows(tmp_path / "whole")[3:], rows(tmp_path / "rest")
    assert len(rest) == 10
    for name in ("step", "consumed_samples", "lr", "loss_scale", "skipped"):
        assert [row[name] for row in rest] == [row[name] for row in whole], name
    assert len({row["loss_scale"] for row in rest}) > 2
    assert [row["lm_loss"] for row in rest] == pytest.approx([row["lm_loss"] for row in whole], rel=2e-3)
