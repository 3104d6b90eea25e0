"""bf16 and fp16: master weights in fp32, dynamic loss scaling, overflows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve

STEPS = 8


def test_bf16_stays_close_to_fp32(tiny_data: Path) -> None:
    """bf16 has 8 bits, 0.4 % a value; the mean over 256 tokens of a loss of 6 is much closer: within 0.5 %.

    Gradient norms carry the rounding of every layer: within 5 %.
    """
    flags = data_flags(tiny_data) | {"train_iters": STEPS, "lr": 2e-3}
    exact, half = (run_ranks(1, train_curve, tiny_run(**flags, bf16=bf16))[0] for bf16 in (False, True))
    assert half.losses == pytest.approx(exact.losses, rel=5e-3)
    assert half.losses != exact.losses
    assert half.grad_norms == pytest.approx(exact.grad_norms, rel=5e-2)
    assert half.losses[-1] < half.losses[0] - 0.3


def start_trainer(run: Any) -> Any:
    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.loop import Trainer

    return Trainer.build(run, start(run.parallel, run.virtual_stages))


def master_weights(run: Any) -> dict[str, Any]:
    """Whether fp32 masters exist, differ from the weights, and round to them; after some small steps."""
    from megatron_moe.training.step import train_step

    trainer = start_trainer(run)
    batches = trainer._training_batches()
    for _ in range(4):
        train_step(trainer.run, trainer.model, trainer.optimizer, batches, 4)
    pairs = [(parameter, parameter.main_param) for chunk in trainer.model for parameter in chunk.parameters()]
    return {
        "dtypes": sorted({(str(weight.dtype), str(master.dtype)) for weight, master in pairs}),
        "rounded": all(bool((master.to(weight.dtype) == weight).all()) for weight, master in pairs),
        "finer": any(bool((master != weight.float()).any()) for weight, master in pairs),
        "grads": sorted({str(weight.main_grad.dtype) for weight, _ in pairs}),
    }


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_masters_are_fp32_and_weights_their_rounding(precision: str, tiny_data: Path) -> None:
    flags = data_flags(tiny_data) | {precision: True, "lr": 1e-4}
    if precision == "fp16":
        flags["initial_loss_scale"] = 1024.0
    state = run_ranks(1, master_weights, tiny_run(**flags))[0]
    assert state == {
        "dtypes": [("torch.bfloat16" if precision == "bf16" else "torch.float16", "torch.float32")],
        "rounded": True,
        "finer": True,
        "grads": ["torch.float32"],
    }


def scales(run: Any, poisoned: dict[int, str]) -> list[dict[str, Any]]:
    """Steps of which some have an infinite gradient: in the experts' weights, or in the rest, of the last rank."""
    import torch.distributed as dist

    from megatron_moe.training.step import train_step

    trainer = start_trainer(run)
    batches = trainer._training_batches()
    scalers = [part.grad_scaler for part in trainer.optimizer.chained_optimizers]
    finalize = trainer.model[0].module.config.finalize_model_grads_func
    history = []
    for step in range(run.training.train_iters):

        def poison(*args: Any, step: int = step, **kwargs: Any) -> None:
            finalize(*args, **kwargs)
            # Replicas have the same gradients of the rest, but experts of their own.
            last = dist.get_rank() == dist.get_world_size() - 1
            replicated = run.parallel.expert_model_parallel_size > 1 and poisoned.get(step) == "the rest"
            if step in poisoned and (last or replicated):
                parameter = next(
                    parameter
                    for name, parameter in trainer.model[0].named_parameters()
                    if ("experts" in name) == (poisoned[step] == "experts")
                )
                parameter.main_grad.view(-1)[0] = torch.inf

        for chunk in trainer.model:
            chunk.module.config.finalize_model_grads_func = poison
        before = [parameter.detach().clone() for parameter in trainer.model[0].parameters()]
        used = float(trainer.optimizer.get_loss_scale())
        result = train_step(trainer.run, trainer.model, trainer.optimizer, batches, trainer.schedule.micro_batches(0))
        moved = any(bool((old != new).any()) for old, new in zip(before, trainer.model[0].parameters(), strict=True))
        history.append(
            {
                "used": used,
                "skipped": result.skipped,
                "moved": moved,
                "scales": [float(scaler.scale) for scaler in scalers],
                "finite": result.grad_norm < float("inf"),
            }
        )
    return history


FP16 = {"fp16": True, "initial_loss_scale": 64.0, "hysteresis": 2, "loss_scale_window": 3, "train_iters": 7}


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [(1, {}), (2, {"pipeline_model_parallel_size": 2}), (2, {"expert_model_parallel_size": 2})],
    ids=["one process", "pipeline 2", "expert 2"],
)
@pytest.mark.parametrize("where", ["experts", "the rest"])
def test_overflow_skips_the_step_and_lowers_every_scale(
    where: str, world_size: int, sizes: dict[str, int], tiny_data: Path
) -> None:
    """The second overflow halves the scale (hysteresis 2), three good steps double it again.

    On all ranks, and for experts and the rest alike: the loss is scaled for both at once.
    """
    run = tiny_run(**data_flags(tiny_data), **FP16, **sizes)
    for history in run_ranks(world_size, scales, run, {1: where, 2: where}):
        assert [step["skipped"] for step in history] == [False, True, True, False, False, False, False]
        assert [step["moved"] for step in history] == [not step["skipped"] for step in history]
        assert [step["used"] for step in history] == [64, 64, 64, 32, 32, 32, 64]
        for step in history:
            assert len(set(step["scales"])) == 1, step
            assert step["finite"]


def test_too_large_a_first_scale_is_found_down(tiny_data: Path) -> None:
    """2^32 overflows fp16 at once: steps are skipped until it fits, and then the loss falls."""
    run = tiny_run(**data_flags(tiny_data), fp16=True, initial_loss_scale=2.0**20, train_iters=16, lr=2e-3)
    curve = run_ranks(1, train_curve, run)[0]
    assert 0 < curve.skipped < 12
    assert curve.losses[-1] < curve.losses[0]


def test_fixed_loss_scale_stays(tiny_data: Path) -> None:
    flags = FP16 | {"loss_scale": 64.0, "train_iters": 3}
    (history,) = run_ranks(1, scales, tiny_run(**data_flags(tiny_data), **flags), {1: "the rest"})
    assert [step["skipped"] for step in history] == [False, True, False]
    assert {scale for step in history for scale in step["scales"]} == {64.0}


def test_loss_scale_does_not_show_in_what_is_reported(tiny_data: Path) -> None:
    """Loss and gradient norm are those of bf16's magnitude, not multiplied by the scale: within 5 % of fp32."""
    flags = data_flags(tiny_data) | {"train_iters": 2, "lr": 1e-4}
    exact = run_ranks(1, train_curve, tiny_run(**flags))[0]
    scaled = run_ranks(1, train_curve, tiny_run(**flags, fp16=True, loss_scale=512.0))[0]
    assert scaled.losses == pytest.approx(exact.losses, rel=5e-3)
    assert scaled.grad_norms == pytest.approx(exact.grad_norms, rel=5e-2)
