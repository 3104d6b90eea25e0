"""Optimizer and learning rate: what is decayed, fused kernels, and every schedule against its formula."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.models import Shard, assemble, gradient_shards, perturb, shards, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run


def start_trainer(run: Any) -> Any:
    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.loop import Trainer

    trainer = Trainer.build(run, start(run.parallel, run.virtual_stages))
    perturb(trainer.model)
    trainer.optimizer.reload_model_params()
    return trainer


# ---- what is decayed


def step_without_gradients(run: Any) -> list[list[Shard]]:
    trainer = start_trainer(run)
    before = shards(trainer.model)
    trainer.optimizer.zero_grad()
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.optimizer.step()
    return [before, shards(trainer.model)]


@pytest.mark.parametrize("flags", [{}, {"bf16": True}, {"use_distributed_optimizer": True}], ids=str)
def test_norms_and_biases_are_not_decayed(flags: dict[str, Any], tiny_data: Path) -> None:
    """With no gradient AdamW's step is the decay alone: w (1 - lr * weight decay)."""
    run = tiny_run(**data_flags(tiny_data), lr=0.1, weight_decay=0.5, qk_layernorm=True, **flags)
    before, after = (assemble([part]) for part in run_ranks(1, step_without_gradients, run)[0])
    decayed, kept = set(), set()
    for key, tensor in before.items():
        factor = after[key] / np.where(tensor == 0, 1, tensor)
        # bf16 weights are rounded to 8 bits.
        if np.allclose(factor[tensor != 0], 0.95, atol=1e-2 if "bf16" in flags else 1e-6):
            decayed.add(key)
        else:
            np.testing.assert_array_equal(after[key], tensor, err_msg=key)
            kept.add(key)
    assert all(key.endswith("bias") or "norm" in key for key in kept), kept
    assert not any(key.endswith("bias") or "norm" in key for key in decayed), decayed
    assert any("experts" in key for key in kept)
    assert any("experts" in key for key in decayed)
    assert any("router" in key for key in decayed)
    assert any("coefficient" in key for key in decayed)


# ---- kernels


def fused_groups(run: Any) -> list[Any]:
    trainer = start_trainer(run)
    return [
        group.get("fused") for part in trainer.optimizer.chained_optimizers for group in part.optimizer.param_groups
    ]


def train_unfused(run: Any) -> Any:
    from megatron_moe.training import optimizer

    optimizer._use_fused_adam = lambda built: None
    return train_and_gather(run)


def test_fused_adam_equals_the_plain_one(tiny_data: Path) -> None:
    """Three steps at a learning rate of 0.01; one pass instead of several rounds differently: 2e-5."""
    run = tiny_run(**data_flags(tiny_data), weight_decay=0.1)
    assert set(run_ranks(1, fused_groups, run)[0]) == {True}
    fused, plain = (run_ranks(1, function, run)[0] for function in (train_and_gather, train_unfused))
    assert fused.losses == pytest.approx(plain.losses, rel=2e-5)
    assert fused.grad_norms == pytest.approx(plain.grad_norms, rel=2e-4)
    assert plain.losses[2] < plain.losses[0]


def first_moments(run: Any) -> tuple[float, float]:
    """Norm before clipping, and sum of squares of the gradients that Adam has seen on this rank, after one step."""
    from megatron_moe.training.step import train_step

    trainer = start_trainer(run)
    result = train_step(trainer.run, trainer.model, trainer.optimizer, trainer._training_batches(), 2)
    squares = 0.0
    for part in trainer.optimizer.chained_optimizers:
        assert part.config.clip_grad == 0.0, "megatron-core would clip as well"
        for state in part.optimizer.state.values():
            squares += float((state["exp_avg"] / 0.1).double().square().sum())
    return result.grad_norm, squares


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, {}),
        (1, {"bf16": True}),
        (1, {"fp16": True, "initial_loss_scale": 64.0}),
        (1, {"use_distributed_optimizer": True}),
        (2, {"use_distributed_optimizer": True, "bf16": True}),
    ],
    ids=str,
)
def test_adam_sees_clipped_gradients(ranks: int, flags: dict[str, Any], tiny_data: Path) -> None:
    """m = (1 - beta1) g after the first step. Adam itself hardly notices the length of a gradient."""
    for clip in (1e-2, 1e3):
        run = tiny_run(**data_flags(tiny_data), clip_grad=clip, adam_beta1=0.9, **flags)
        outcomes = run_ranks(ranks, first_moments, run)
        (norm,) = {norm for norm, _ in outcomes}
        assert 0.1 < norm < 1e3
        assert math.sqrt(sum(squares for _, squares in outcomes)) == pytest.approx(min(norm, clip), rel=1e-3)


def train_clipping_first(run: Any) -> Any:
    from megatron_moe.training import optimizer

    optimizer._clip_in_the_update = lambda built: None
    return train_and_gather(run)


def test_clipping_in_the_update_equals_clipping_before_it(tiny_data: Path) -> None:
    """g * (limit / norm) against g / (norm / limit): two roundings of 2^-24 apart, over three steps of Adam."""
    run = tiny_run(**data_flags(tiny_data), clip_grad=0.05, weight_decay=0.1)
    within, before = (run_ranks(1, function, run)[0] for function in (train_and_gather, train_clipping_first))
    assert min(before.grad_norms) > 0.05
    assert within.losses == pytest.approx(before.losses, rel=1e-6)
    assert within.grad_norms == pytest.approx(before.grad_norms, rel=1e-5)


def sgd_step(run: Any) -> list[list[Shard]]:
    from megatron_moe.training.step import train_step

    trainer = start_trainer(run)
    before = shards(trainer.model)
    train_step(trainer.run, trainer.model, trainer.optimizer, trainer._training_batches(), 4)
    after = shards(trainer.model)
    return [before, after, gradient_shards(trainer.model)]


@pytest.mark.parametrize("clip", [0.0, 1e-2, 1e3])
def test_sgd_steps_along_the_gradient_and_clipping_shortens_it(clip: float, tiny_data: Path) -> None:
    """w - lr * g, where g is the gradient scaled to the clipping norm if it is longer."""
    flags = {"optimizer": "sgd", "lr": 0.5, "weight_decay": 0.0, "clip_grad": clip}
    run = tiny_run(**data_flags(tiny_data), **flags)
    before, after, gradients = (assemble([part]) for part in run_ranks(1, sgd_step, run)[0])
    squares = 0.0
    for key, tensor in before.items():
        step = after[key] - tensor
        squares += float(np.square(step, dtype=np.float64).sum())
        np.testing.assert_allclose(step, -0.5 * gradients[key], atol=1e-6)
    length = math.sqrt(squares) / 0.5
    if clip == 1e-2:
        assert length == pytest.approx(clip, rel=1e-3)
    else:
        assert length > 0.1


# ---- schedules

LR, MIN, BATCH, STEPS, WARMUP = 1.0, 0.1, 8, 40, 8


class Group:
    """What the scheduler sees of an optimizer."""

    def __init__(self) -> None:
        self.param_groups = [{"lr": 0.0, "weight_decay": 0.0, "wd_mult": 1.0}]


def rates(flags: dict[str, Any]) -> list[float]:
    """Learning rate of every step, and of a few after the last."""
    from megatron_moe.training.batches import BatchSchedule
    from megatron_moe.training.optimizer import build_scheduler

    run = tiny_run(**{"lr": LR, "min_lr": MIN, "train_iters": STEPS} | flags)
    optimizer = Group()
    schedule = BatchSchedule.from_run(run, 1)
    scheduler = build_scheduler(run, optimizer, schedule, STEPS)
    result, consumed = [], 0
    for _ in range(STEPS + 4):
        result.append(float(optimizer.param_groups[0]["lr"]))
        size = schedule.batch_size(consumed)
        scheduler.step(increment=size)
        consumed += size
    return result


def between(fraction: float) -> float:
    return MIN + (LR - MIN) * fraction


def cosine(progress: float) -> float:
    return between(0.5 * (1 + math.cos(math.pi * progress)))


WSD = {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 10, "lr_wsd_decay_style": "linear"}
FORMULAS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": ({"lr_decay_style": "constant"}, lambda step: LR),
    "linear": ({"lr_decay_style": "linear"}, lambda step: between(1 - (step - WARMUP) / (STEPS - WARMUP))),
    "cosine": ({"lr_decay_style": "cosine"}, lambda step: cosine((step - WARMUP) / (STEPS - WARMUP))),
    "inverse square root": (
        {"lr_decay_style": "inverse-square-root"},
        lambda step: max(MIN, LR * math.sqrt(WARMUP / step)),
    ),
    "WSD": (WSD, lambda step: between(1 - max(0, step - 30) / 10)),
    "WSD, exponential": (
        WSD | {"lr_wsd_decay_style": "exponential"},
        lambda step: between(2 * 0.5 ** (max(0, step - 30) / 10) - 1),
    ),
    "WSD, cosine": (WSD | {"lr_wsd_decay_style": "cosine"}, lambda step: cosine(max(0, step - 30) / 10)),
    "WSD, square root": (
        WSD | {"lr_wsd_decay_style": "minus_sqrt"},
        lambda step: between(1 - math.sqrt(max(0, step - 30) / 10)),
    ),
}


def all_rates() -> dict[str, list[float]]:
    found = {name: rates(flags | {"lr_warmup_iters": WARMUP}) for name, (flags, _) in FORMULAS.items()}
    found["fraction"] = rates({"lr_decay_style": "cosine", "lr_warmup_fraction": WARMUP / STEPS})
    found["decay length"] = rates({"lr_decay_style": "linear", "lr_decay_iters": 20})
    found["warm start"] = rates({"lr_decay_style": "constant", "lr_warmup_iters": 4, "lr_warmup_init": 0.2})
    found["ramp-up"] = rates({"lr_decay_style": "linear", "rampup_batch_size": (4, 4, 80)})
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, list[float]]:
    return run_ranks(1, all_rates)[0]


@pytest.mark.parametrize("name", FORMULAS)
def test_schedule_equals_its_formula(name: str, measured: dict[str, list[float]]) -> None:
    """Step n (from 0) uses the rate of n full batches; the warm-up rises from 0."""
    formula = FORMULAS[name][1]
    warm = [LR * step / WARMUP for step in range(WARMUP + 1)]
    expected = warm + [formula(step) for step in range(WARMUP + 1, STEPS + 1)]
    assert measured[name][: STEPS + 1] == pytest.approx(expected, rel=1e-9)
    assert measured[name][-1] == pytest.approx(LR if name == "constant" else MIN)


def test_warmup_and_decay_lengths(measured: dict[str, list[float]]) -> None:
    assert measured["fraction"] == pytest.approx(measured["cosine"])
    assert measured["decay length"][10] == pytest.approx(between(0.5))
    assert measured["decay length"][21:] == pytest.approx([MIN] * 23)
    assert measured["warm start"][:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_ramp_up_does_not_hasten_the_decay(measured: dict[str, list[float]]) -> None:
    """Twenty steps of 4 samples are a third, not half, of the way through 240; the decay ends with the run."""
    assert measured["ramp-up"][20] == pytest.approx(between(1 - 80 / 240))
    assert measured["ramp-up"][STEPS] == pytest.approx(MIN)
