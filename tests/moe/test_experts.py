"""Experts under expert tensor parallelism: biases that count once, gradients and norms equal to one process.

Upstream counts an expert's output bias once per expert-tensor rank and sums its gradient over ranks that hold other
experts; see `megatron_moe/moe/experts/sequential.py`. Biases start at 0, which would hide both: every
parameter is perturbed.

Tolerance: fp32, 2e-5 of the largest value of each tensor (sums in another order after three updates); a bias counted
twice, or a gradient summed twice, is off by 1.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, assert_close, norm_of, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run

TENSOR, EXPERT, EXPERT_TENSOR = (
    "tensor_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
# SGD: Adam divides by the gradient's size, which turns the rounding of tiny gradients into full steps.
FLAGS = {"clip_grad": 0.0, "optimizer": "sgd", "lr": 0.1, "moe_router_topk": 2}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor 2, expert tensor 2": (2, {TENSOR: 2, EXPERT_TENSOR: 2}),
    "tensor 2, expert tensor 1, expert 2": (2, {TENSOR: 2, EXPERT_TENSOR: 1, EXPERT: 2}),
    "tensor 2, expert tensor 1": (2, {TENSOR: 2, EXPERT_TENSOR: 1}),
    "expert tensor 2 without tensor": (2, {EXPERT_TENSOR: 2}),
    "tensor 2, expert tensor 2, expert 2": (4, {TENSOR: 2, EXPERT_TENSOR: 2, EXPERT: 2}),
}


@pytest.fixture(scope="module")
def one_process(tiny_data: Path) -> Trained:
    return run_ranks(1, train_and_gather, tiny_run(**data_flags(tiny_data), **FLAGS))[0]


def test_norm_counts_every_parameter_once_in_one_process(one_process: Trained) -> None:
    gradients = assemble([one_process.gradients])
    assert one_process.grad_norms[-1] == pytest.approx(norm_of(gradients), rel=1e-6)
    biases = [key for key in gradients if "experts" in key and key.endswith("linear_fc2.bias")]
    assert biases, "the experts must have output biases, or this file proves nothing"
    assert all(abs(gradients[key]).max() > 0 for key in biases)
    assert any("coefficient.weight" in key for key in gradients)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_equal_one_process(name: str, tiny_data: Path, one_process: Trained) -> None:
    world_size, sizes = LAYOUTS[name]
    ranks = run_ranks(world_size, train_and_gather, tiny_run(**data_flags(tiny_data), **FLAGS, **sizes))
    assert_close(assemble([rank.gradients for rank in ranks]), assemble([one_process.gradients]), 2e-5)
    for rank in ranks:
        assert rank.losses == pytest.approx(one_process.losses, rel=2e-6)
        assert rank.grad_norms == pytest.approx(one_process.grad_norms, rel=2e-6)


def test_norm_under_a_distributed_optimizer(tiny_data: Path, one_process: Trained) -> None:
    """One step of Adam, whose loss and norm come before the update; ranks keep gradients of their share only."""
    sizes = {TENSOR: 2, EXPERT_TENSOR: 1, EXPERT: 2, "use_distributed_optimizer": True}
    flags = data_flags(tiny_data) | FLAGS | sizes | {"optimizer": "adam", "train_iters": 1}
    for rank in run_ranks(4, train_and_gather, tiny_run(**flags)):
        assert rank.losses == pytest.approx(one_process.losses[:1], rel=2e-6)
        assert rank.grad_norms == pytest.approx(one_process.grad_norms[:1], rel=2e-6)
