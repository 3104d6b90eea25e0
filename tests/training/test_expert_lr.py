"""Learning rate and epsilon of the experts: the rule, the update it makes, and that groups survive a resume."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.validate import validate
from megatron_moe.training.expert_lr import batch_factor, expert_factors
from tests.helpers.distributed import run_ranks
from tests.helpers.models import assemble, gradient_shards, perturb, shards
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import build_trainer, train_curve

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
BOTH = {"expert_lr_scale": "auto", "expert_adam_eps": 1e-20}


# ---- the rule


def test_published_batch_factor() -> None:
    """Hunyuan-Large: 16 experts, top-1, 0.31."""
    assert batch_factor(16, 0.26) == pytest.approx(0.31, abs=5e-4)


def test_limits_of_the_rule() -> None:
    """Small batches: 1 / sqrt(n); at the noise batch 2 / (sqrt(n) + 1 / sqrt(n)); one expert sees the whole batch."""
    assert batch_factor(16, 1e-9) == pytest.approx(1 / 4)
    assert batch_factor(16, 1.0) == pytest.approx(2 / (4 + 1 / 4))
    assert batch_factor(1, 0.7) == pytest.approx(1.0)
    # Beyond the noise batch a smaller one may want a larger rate: the curve falls on both sides of B_noise.
    assert batch_factor(4, 4.0) == pytest.approx((math.sqrt(4) + math.sqrt(1 / 4)) / 2)


def test_factors_follow_each_layers_experts_and_topk() -> None:
    run = tiny_run(vocab_size=100, moe_router_topk=2, expert_lr_scale="auto", batch_noise_ratio=0.5)
    assert expert_factors(run) == pytest.approx([batch_factor(2, 0.5), batch_factor(4, 0.5)])
    assert expert_factors(tiny_run(vocab_size=100, expert_lr_scale="0.3")) == (0.3, 0.3)
    assert expert_factors(tiny_run(vocab_size=100)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"expert_lr_scale": "Auto"}, "--expert-lr-scale Auto: must be auto or a number greater than 0"),
        ({"expert_lr_scale": "0"}, "--expert-lr-scale 0: must be auto or a number greater than 0"),
        ({"expert_lr_scale": "nan"}, "--expert-lr-scale nan: must be auto or a number greater than 0"),
        ({"expert_lr_scale": "inf"}, "--expert-lr-scale inf: must be auto or a number greater than 0"),
        ({"batch_noise_ratio": 0.5}, "--batch-noise-ratio 0.5: needs --expert-lr-scale auto"),
        (
            {"batch_noise_ratio": 0.0, "expert_lr_scale": "auto"},
            "--batch-noise-ratio 0.0: must be a number greater than 0",
        ),
        ({"expert_adam_eps": 0.0}, "--expert-adam-eps 0.0: must be a number greater than 0"),
        ({"expert_adam_eps": 1e-20, "optimizer": "sgd"}, "--expert-adam-eps 1e-20: SGD has no epsilon"),
        ({"expert_lr_scale": "auto", "optimizer": "sgd"}, "--expert-lr-scale auto: its rule is Adam's"),
        (
            {"expert_lr_scale": "2", "num_experts": None, "expert_interval": 1, "mlp_type": "standard"},
            "--expert-lr-scale 2: needs --num-experts",
        ),
    ],
)
def test_what_cannot_work_is_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(tiny_run(**flags), 1)
    assert message in str(raised.value)


# ---- the update

LR, START, WARMUP, DECAY = 1e-2, 2e-3, 2, 0.1


def is_expert(key: str) -> bool:
    return ".mlp.experts." in key


def train_step_by_step(run: Any) -> list[Any]:
    """Weights before and after each step, and the gradients of each (they take the place of the weights at the end)."""
    from megatron_moe.training.step import train_step

    trainer = build_trainer(run)
    perturb(trainer.model)
    trainer.optimizer.reload_model_params()
    batches = trainer._training_batches()
    weights, gradients = [shards(trainer.model)], []
    for step in range(trainer.steps):
        trainer.clock.begin(step)
        result = train_step(trainer.run, trainer.model, trainer.optimizer, batches, trainer.schedule.micro_batches(0))
        trainer.clock.finish(skipped=result.skipped)
        trainer.scheduler.step(increment=8)
        weights.append(shards(trainer.model))
        kept = [parameter.detach().clone() for chunk in trainer.model for parameter in chunk.parameters()]
        gradients.append(gradient_shards(trainer.model))
        for chunk in trainer.model:
            for parameter, value in zip(chunk.parameters(), kept, strict=True):
                parameter.data.copy_(value)
    return [weights, gradients]


def expected_weights(
    start: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]], scales: dict[str, float], eps: float
) -> dict[str, np.ndarray]:
    """AdamW by hand, in double precision, each tensor at its own rate and epsilon; biases and norms do not decay."""
    result = {}
    for key, tensor in start.items():
        value, first, second = tensor.astype(np.float64), 0.0, 0.0
        decay = 0.0 if key.endswith("bias") or "norm" in key else DECAY
        epsilon = eps if is_expert(key) else 1e-8
        for step, step_gradients in enumerate(gradients):
            rate = scales.get(key.split(".mlp.")[0], 1.0) if is_expert(key) else 1.0
            rate *= START + (LR - START) * min(1.0, step / WARMUP)
            gradient = step_gradients[key].astype(np.float64)
            first = 0.9 * first + 0.1 * gradient
            second = 0.95 * second + 0.05 * gradient**2
            change = (first / (1 - 0.9 ** (step + 1))) / (np.sqrt(second / (1 - 0.95 ** (step + 1))) + epsilon)
            value = value * (1 - rate * decay) - rate * change
        result[key] = value
    return result


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, {"expert_lr_scale": "0.25"}),
        (1, BOTH),
        (2, BOTH | {EXPERT: 2, "use_distributed_optimizer": True}),
    ],
    ids=["0.25", "auto", "auto, expert 2, distributed optimizer"],
)
def test_update_equals_adam_by_hand(world_size: int, flags: dict[str, Any], tiny_data: Path) -> None:
    """Three steps through the warm-up. fp32 against double: 1e-6 of what weights move by, near 1e-2."""
    schedule = {"lr": LR, "lr_warmup_iters": WARMUP, "lr_warmup_init": START, "weight_decay": DECAY, "clip_grad": 0.0}
    run = tiny_run(**data_flags(tiny_data), **schedule, **flags)
    ranks = run_ranks(world_size, train_step_by_step, run)
    weights = [assemble([rank[0][step] for rank in ranks]) for step in range(4)]
    gradients = [assemble([rank[1][step] for rank in ranks]) for step in range(3)]
    names = {4: "decoder.layers.1", 8: "decoder.layers.3"}
    scales = {name: batch_factor(n, 0.26) if flags["expert_lr_scale"] == "auto" else 0.25 for n, name in names.items()}
    assert {key.split(".mlp.")[0] for key in weights[0] if is_expert(key)} == set(scales)
    expected = expected_weights(weights[0], gradients, scales, flags.get("expert_adam_eps", 1e-8))
    for key, tensor in expected.items():
        np.testing.assert_allclose(weights[3][key], tensor, atol=2e-7, rtol=1e-6, err_msg=key)
    plain = expected_weights(weights[0], gradients, {}, 1e-8)
    for key in filter(is_expert, plain):
        assert np.abs(plain[key] - weights[3][key]).max() > 1e-3, key


def test_tiny_epsilon_makes_no_infinities() -> None:
    """Experts without tokens stay; a second moment that underflows to 0 under a gradient that does not: finite."""
    from torch import full, optim, tensor

    for gradient in (0.0, 1e-45, 1e-30, 1e-22, 1e-20, 1e-18, 1.0):
        weight = tensor([1.0], requires_grad=True)
        adam = optim.AdamW([weight], lr=1e-2, eps=1e-20, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
        for _ in range(50):
            weight.grad = full((1,), gradient)
            adam.step()
        weight.grad = full((1,), 0.0)
        for _ in range(200):
            adam.step()
        moved = abs(float(weight.detach()) - 1.0)
        assert moved <= 50 * 1e-2 * 1.2 + 200 * 1e-2
        assert (moved == 0.0) == (gradient <= 1e-30)


# ---- metrics


def test_metrics_name_the_rate_of_the_rest_first(tiny_data: Path, tmp_path: Path) -> None:
    run = tiny_run(**data_flags(tiny_data), expert_lr_scale="auto", save=str(tmp_path), tensorboard=False, lr=4e-3)
    run_ranks(1, train_curve, run)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["lr"] for row in rows] == [4e-3] * 3
    assert [row["expert_lr"] for row in rows] == pytest.approx([4e-3 * batch_factor(4, 0.26)] * 3)
    assert [row["expert_lr_min"] for row in rows] == pytest.approx([4e-3 * batch_factor(8, 0.26)] * 3)


# ---- resume

EXPERTS = {"expert_interval": 1, "moe_layer_freq": (0, 0, 1, 1)}
SCHEDULE = {"lr_decay_style": "cosine", "lr_warmup_iters": 1, "lr_decay_iters": 6, "tensorboard": False}
CHAIN: tuple[tuple[int, dict[str, Any]], ...] = (
    (1, {}),
    (4, {TENSOR: 2, PIPELINE: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
    # Of two stages, here as above, the first has no experts.
    (4, {PIPELINE: 2, EXPERT: 2, "use_distributed_optimizer": True}),
    (2, {EXPERT: 2, "use_distributed_optimizer": True}),
    (1, {}),
)


def test_groups_survive_other_layouts(tiny_data: Path, tmp_path: Path) -> None:
    """A step or two under each layout are five at once, within what sums in another order make of it."""
    flags = data_flags(tiny_data) | EXPERTS | SCHEDULE | BOTH
    whole = run_ranks(1, train_curve, tiny_run(**flags, train_iters=6))[0]
    losses: list[float] = []
    for last, (world_size, layout) in enumerate(CHAIN, start=2):
        folder = {"save": str(tmp_path), "load": str(tmp_path)}
        run = tiny_run(**flags, **layout, **folder, train_iters=last)
        losses += run_ranks(world_size, train_curve, run)[0].losses
    assert losses == pytest.approx(whole.losses, rel=1e-4)


def groups_of(runs: list[Any]) -> list[list[tuple[float, float, int]]]:
    """For each run: rate and epsilon of every group that has parameters, and how many it has."""
    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.loop import Trainer

    world = start(runs[0].parallel, runs[0].virtual_stages)
    found = []
    for run in runs:
        groups = Trainer.build(run, world).optimizer.param_groups
        found.append([(group["lr"], group["eps"], len(group["params"])) for group in groups if group["params"]])
    return found


@pytest.mark.parametrize("kind", [{"bf16": True}, {"use_distributed_optimizer": True}], ids=str)
def test_flags_win_over_the_checkpoint(kind: dict[str, Any], tiny_data: Path, tmp_path: Path) -> None:
    """A run may go on with another factor, with an epsilon of its own only, or without either."""
    flags = data_flags(tiny_data) | {"tensorboard": False, "lr": 1e-3} | kind
    run_ranks(1, train_curve, tiny_run(**flags, **BOTH, train_iters=1, save=str(tmp_path)))
    changes: list[dict[str, Any]] = [{"expert_lr_scale": "0.5"}, {"expert_adam_eps": 1e-20}, BOTH, {}]
    runs = [
        tiny_run(**flags, **change, **folder, train_iters=3)
        for folder in ({}, {"load": str(tmp_path)})
        for change in changes
    ]
    groups = run_ranks(1, groups_of, runs)[0]
    fresh, loaded = groups[:4], groups[4:]
    assert loaded == fresh
    assert {rate for rate, _, _ in loaded[0]} == {1e-3, 5e-4}
    assert {eps for _, eps, _ in loaded[1]} == {1e-8, 1e-20}
    assert len({rate for rate, _, _ in loaded[2]}) == 3
    assert {(rate, eps) for rate, eps, _ in loaded[3]} == {(1e-3, 1e-8)}
