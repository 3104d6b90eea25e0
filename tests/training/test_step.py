"""One step: how batches are cut, how losses are averaged, and that evaluating changes nothing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, norm_of, shards, start_model, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve


def cut(ranks: int) -> list[int]:
    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.step import context_parallel_slice

    start(tiny_run(context_parallel_size=ranks).parallel)
    tokens = torch.arange(16).repeat(2, 1)
    part = context_parallel_slice({"tokens": tokens, "labels": tokens + 100})
    assert torch.equal(part["labels"], part["tokens"] + 100)
    assert torch.equal(part["tokens"][0], part["tokens"][1])
    return part["tokens"][0].tolist()


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, [list(range(16))]),
        (2, [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]),
        (4, [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]),
    ],
)
def test_context_parallel_parts_are_balanced(ranks: int, expected: list[list[int]]) -> None:
    """Causal work grows along the sequence: every rank gets an early and a late chunk."""
    assert run_ranks(ranks, cut, ranks) == expected


def test_loss_counts_unmasked_tokens_only() -> None:
    from megatron_moe.training.step import next_token_loss

    loss = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=torch.bfloat16)
    mask = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    total, tokens, report = next_token_loss(mask, loss)
    assert total.item() == 37.0
    assert total.dtype == torch.float32
    assert tokens.item() == 3
    assert tokens.dtype == torch.int
    assert report["loss"].tolist() == [37.0, 3.0]


def weighted_mean() -> float:
    import torch.distributed as dist

    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.step import mean_loss

    start(tiny_run().parallel)
    rank = dist.get_rank()
    reports = [{"loss": torch.tensor([10.0, 4.0])}, {"loss": torch.tensor([2.0, 2.0])}][: 2 - rank]
    return mean_loss(reports)


def test_mean_is_over_tokens_not_over_ranks() -> None:
    assert run_ranks(2, weighted_mean) == [pytest.approx((10 + 2 + 10) / (4 + 2 + 4))] * 2


def evaluate_by_hand(run: Any) -> dict[str, Any]:
    """The evaluation's loss, the same from logits, and whether anything changed."""
    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.loop import Trainer
    from megatron_moe.training.step import evaluate

    trainer = Trainer.build(run, start(run.parallel, run.virtual_stages))
    before = shards(trainer.model)
    state = torch.get_rng_state()
    losses = [evaluate(trainer.run, trainer.model, trainer._training_batches(), 2, 2) for _ in range(2)]
    unmoved = torch.equal(state, torch.get_rng_state())
    after = shards(trainer.model)
    training = all(chunk.training for chunk in trainer.model)
    (batches,) = trainer._training_batches()
    total = tokens = 0.0
    trainer.model[0].eval()
    with torch.no_grad():
        for _ in range(4):
            batch = next(batches)
            logits = trainer.model[0](batch["tokens"], batch["position_ids"], None)
            each = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="none")
            total += float((each * batch["loss_mask"].flatten()).sum())
            tokens += float(batch["loss_mask"].sum())
    return {
        "losses": losses,
        "by hand": total / tokens,
        "masked": tokens < 4 * 2 * 32,
        "unmoved": unmoved,
        "training": training,
        "same": all(np.array_equal(a.values, b.values) for a, b in zip(before, after, strict=True)),
    }


@pytest.mark.parametrize("masked", [False, True])
def test_evaluation_is_the_mean_cross_entropy_and_changes_nothing(masked: bool, tiny_data: Path) -> None:
    flags = data_flags(tiny_data) | {"hidden_dropout": 0.2, "attention_dropout": 0.2, "eod_mask_loss": masked}
    result = run_ranks(1, evaluate_by_hand, tiny_run(**flags))[0]
    assert result["losses"] == [pytest.approx(result["by hand"], rel=1e-5)] * 2
    assert result["masked"] == masked
    assert result["unmoved"]
    assert result["training"]
    assert result["same"]
    # Before any training: near the logarithm of the vocabulary.
    assert result["losses"][0] == pytest.approx(math.log(896), rel=0.05)


def test_evaluating_between_steps_does_not_change_training(tiny_data: Path) -> None:
    flags = data_flags(tiny_data) | {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    alone, evaluated = (
        run_ranks(1, train_curve, tiny_run(**flags, eval_interval=interval, eval_iters=1))[0] for interval in (0, 1)
    )
    assert evaluated.losses == alone.losses
    assert len(evaluated.evaluations) == 3


@pytest.mark.parametrize("masked", [False, True])
def test_masked_tokens_weigh_the_same_under_every_split(masked: bool, tiny_data: Path) -> None:
    """The loss is a mean over all tokens of a step, however they are spread over micro-batches and ranks."""
    flags = data_flags(tiny_data) | {"eod_mask_loss": masked, "moe_aux_loss_coeff": 0.0}
    one = run_ranks(1, train_curve, tiny_run(**flags, micro_batch_size=8))[0]
    for world_size, micro in ((1, 1), (2, 1), (2, 4)):
        for curve in run_ranks(world_size, train_curve, tiny_run(**flags, micro_batch_size=micro)):
            assert curve.losses == pytest.approx(one.losses, rel=2e-5)
            assert curve.grad_norms == pytest.approx(one.grad_norms, rel=2e-4)


def test_norm_is_reported_without_clipping_too(tiny_data: Path) -> None:
    """--clip-grad 0 turns clipping off, not the measurement; also for a dense model, which has one optimizer."""
    flags = {"num_experts": None, "expert_interval": 1, "mlp_type": "standard", "clip_grad": 0.0, "train_iters": 1}
    trained: Trained = run_ranks(1, train_and_gather, tiny_run(**data_flags(tiny_data), **flags))[0]
    assert trained.grad_norms[0] == pytest.approx(norm_of(assemble([trained.gradients])), rel=1e-5)


def forward_of_packed_positions() -> list[bool]:
    """Two equal tokens at different places have different logits only through positions and context."""
    run = tiny_run(vocab_size=100)
    (model,) = start_model(run)
    model.eval()
    tokens = torch.full((1, 32), 7)
    here = model(tokens, torch.arange(32)[None], None)
    shifted = model(tokens, torch.arange(32).flip(0)[None], None)
    return [torch.equal(here, shifted)]


def test_positions_given_with_the_batch_are_used() -> None:
    assert run_ranks(1, forward_of_packed_positions)[0] == [False]
