"""Reported expert loads and auxiliary losses: the same for every layout, and each token counted once."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import Curve, train_curve

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data 2": (2, {}),
    "tensor 2": (2, {TENSOR: 2}),
    "expert 2": (2, {EXPERT: 2}),
    "pipeline 2": (2, {PIPELINE: 2}),
    "context 2": (2, {"context_parallel_size": 2}),
    "tensor 2, pipeline 2, expert 2": (4, {TENSOR: 2, PIPELINE: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
}
# Two samples a step: one on each of two replicas, or one after the other.
BASE = {"train_iters": 2, "micro_batch_size": 1, "global_batch_size": 2, "moe_router_topk": 2}
KINDS: dict[str, dict[str, Any]] = {
    "aux and z": {"moe_z_loss_coeff": 1e-3},
    "sequence": {"moe_router_load_balancing_type": "seq_aux_loss"},
    # It averages over the micro-batches so far: only without accumulation is it that of the global batch.
    "global": {"moe_router_load_balancing_type": "global_aux_loss", "micro_batch_size": 2},
}
RELATIVE = 2e-5


def curves(world_size: int, folder: Path, **flags: Any) -> list[Curve]:
    return run_ranks(world_size, train_curve, tiny_run(**data_flags(folder) | BASE | flags))


@pytest.fixture(scope="module")
def one_process(tiny_data: Path) -> dict[str, Curve]:
    return {name: curves(1, tiny_data, **flags)[0] for name, flags in KINDS.items()}


@pytest.mark.parametrize("kind", ["aux and z", "global"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_report_the_same(layout: str, kind: str, tiny_data: Path, one_process: dict[str, Curve]) -> None:
    world_size, sizes = LAYOUTS[layout]
    expected = one_process[kind]
    replicas = 2 if layout in ("data 2", "expert 2") else 1
    flags = KINDS[kind] | sizes | ({"micro_batch_size": 2 // replicas} if kind == "global" else {})
    for curve in curves(world_size, tiny_data, **flags):
        assert curve.loads == expected.loads
        assert curve.losses == pytest.approx(expected.losses, rel=RELATIVE)
        if kind == "aux and z":
            assert curve.z_losses == pytest.approx(expected.z_losses, rel=RELATIVE)
        assert curve.aux_losses == pytest.approx(expected.aux_losses, rel=RELATIVE)


@pytest.mark.parametrize("layout", ["data 2", "tensor 2", "context 2"])
def test_sequence_loss_is_the_same(layout: str, tiny_data: Path, one_process: dict[str, Curve]) -> None:
    world_size, sizes = LAYOUTS[layout]
    for curve in curves(world_size, tiny_data, **KINDS["sequence"], **sizes):
        assert curve.aux_losses == pytest.approx(one_process["sequence"].aux_losses, rel=RELATIVE)


def test_losses_are_of_the_right_size(one_process: dict[str, Curve]) -> None:
    """Near 1 for a router that has not learned yet; the logarithm of 4 and 8 experts, squared, for the z-loss."""
    for kind in ("aux and z", "sequence", "global"):
        assert all(0.95 < loss < 1.6 for loss in one_process[kind].aux_losses), kind
    assert one_process["aux and z"].z_losses[0] == pytest.approx((1.386**2 + 2.079**2) / 2, rel=0.05)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "selective", "recompute_modules": ("moe",)},
    ],
    ids=["full", "experts"],
)
def test_recompute_counts_every_token_once(
    recompute: dict[str, Any], tiny_data: Path, one_process: dict[str, Curve]
) -> None:
    (curve,) = curves(1, tiny_data, **KINDS["aux and z"], **recompute)
    expected = one_process["aux and z"]
    assert curve.loads == expected.loads
    assert all(sum(load[layer]) == 2 * 2 * 32 for load in expected.loads for layer in (2, 4))
    # Counted twice they would be twice as large. Recomputed experts add up their gradients in another order: from the
    # second step on the last bit of a number may differ.
    assert curve.aux_losses == pytest.approx(expected.aux_losses, rel=1e-6)
    assert curve.z_losses == pytest.approx(expected.z_losses, rel=1e-6)


def test_evaluation_is_not_counted(tiny_data: Path, one_process: dict[str, Curve]) -> None:
    flags = KINDS["aux and z"] | {"eval_interval": 1, "eval_iters": 2}
    (curve,) = curves(1, tiny_data, **flags)
    assert len(curve.evaluations) == 2
    assert curve.loads == one_process["aux and z"].loads
    assert curve.aux_losses == one_process["aux and z"].aux_losses


def test_dropped_tokens_are_reported(tiny_data: Path) -> None:
    for world_size, sizes in ((1, {}), (2, {TENSOR: 2, "seq_length": 32})):
        for curve in curves(world_size, tiny_data, moe_expert_capacity_factor=0.5, **sizes):
            for loads, dropped in zip(curve.loads, curve.dropped, strict=True):
                for layer, tokens in loads.items():
                    assert dropped[layer] > 0
                    assert sum(tokens) + dropped[layer] == 2 * 2 * 32
