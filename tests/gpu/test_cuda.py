"""The same code on a GPU: one process on CUDA trains as one process on the CPU does."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import Curve, train_curve

pytestmark = pytest.mark.gpu


def curve(tiny_data: Path, **flags: Any) -> Curve:
    return run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data), **flags))[0]


def test_fp32_on_cuda_equals_the_cpu(tiny_data: Path) -> None:
    """Relative 1e-4: other kernels sum in another order; three steps at a high learning rate amplify it."""
    cpu, cuda = curve(tiny_data, device="cpu"), curve(tiny_data, device="cuda")
    assert cuda.losses == pytest.approx(cpu.losses, rel=1e-4)
    assert cuda.grad_norms == pytest.approx(cpu.grad_norms, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32(tiny_data: Path, precision: str) -> None:
    """Relative 1e-2: bf16 has 8 bits of mantissa; fp16 may skip its first steps while the loss scale falls."""
    half = curve(tiny_data, device="cuda", train_iters=30, **{precision: True})
    full = curve(tiny_data, device="cuda", train_iters=30)
    assert half.losses[0] == pytest.approx(full.losses[0], rel=1e-2)
    assert half.losses[-1] < half.losses[0]


@pytest.mark.parametrize(
    "switch",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"use_distributed_optimizer": True},
        {"moe_token_dispatcher_type": "allgather"},
        {"attention_backend": "unfused"},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_switch_does_not_change_the_mathematics(tiny_data: Path, switch: dict[str, Any]) -> None:
    plain, switched = curve(tiny_data, device="cuda"), curve(tiny_data, device="cuda", **switch)
    assert switched.losses == pytest.approx(plain.losses, rel=1e-4)


def attention_peak_bytes(sequence: int) -> int:
    import torch

    from megatron_moe.model.attention import attention

    shape = (1, 4, sequence, 64)
    query, key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    torch.cuda.reset_peak_memory_stats()
    attention(query, key, value, causal=True, dropout=0.0, scale=0.125).sum().backward()
    return torch.cuda.max_memory_allocated()


def test_attention_memory_is_linear_in_the_sequence() -> None:
    short, long = (run_ranks(1, attention_peak_bytes, sequence)[0] for sequence in (2048, 8192))
    assert long < 5 * short
