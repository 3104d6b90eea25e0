"""Gathers and reduce-scatters of unequal parts, forward and backward, against a computation in one process."""

import numpy as np
import pytest
import torch

from tests.helpers.distributed import run_ranks

WIDTH = 3


def part_of(rank: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rank))


def weights_of(rank: int, rows: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(100 + rank))


def start() -> tuple[int, object]:
    import torch.distributed as dist

    from megatron_moe.runtime import cpu

    cpu.install()
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.group.WORLD


def gather(sizes: list[int]) -> list[np.ndarray]:
    """Upstream's autograd function over the replaced collective: result, and the gradient of its weighted sum."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    rank, group = start()
    x = part_of(rank, sizes[rank]).requires_grad_()
    out = gather_from_sequence_parallel_region(x, group=group, output_split_sizes=sizes)
    (out * weights_of(rank, sum(sizes))).sum().backward()
    return [out.detach().numpy(), x.grad.numpy()]


def reduce_scatter(sizes: list[int]) -> list[np.ndarray]:
    from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region

    rank, group = start()
    x = part_of(rank, sum(sizes)).requires_grad_()
    out = reduce_scatter_to_sequence_parallel_region(x, group=group, input_split_sizes=sizes)
    (out * weights_of(rank, sizes[rank])).sum().backward()
    return [out.detach().numpy(), x.grad.numpy()]


# Equal parts go to upstream's own code when no sizes are given; here they are given.
SIZES = [[3, 1], [0, 4], [2, 2], [4, 1, 2], [0, 0, 3], [5, 0, 1]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gather(sizes: list[int]) -> None:
    """Sums of at most three numbers in some order: 1e-6."""
    results = run_ranks(len(sizes), gather, sizes)
    whole = torch.cat([part_of(rank, rows) for rank, rows in enumerate(sizes)])
    gradient = sum(weights_of(rank, sum(sizes)) for rank in range(len(sizes))).split(sizes)
    for rank, (out, grad) in enumerate(results):
        np.testing.assert_array_equal(out, whole.numpy())
        np.testing.assert_allclose(grad, gradient[rank].numpy(), atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_reduce_scatter(sizes: list[int]) -> None:
    results = run_ranks(len(sizes), reduce_scatter, sizes)
    summed = sum(part_of(rank, sum(sizes)) for rank in range(len(sizes))).split(sizes)
    gradient = torch.cat([weights_of(rank, rows) for rank, rows in enumerate(sizes)])
    for rank, (out, grad) in enumerate(results):
        np.testing.assert_allclose(out, summed[rank].numpy(), atol=1e-6)
        np.testing.assert_array_equal(grad, gradient.numpy())


def without_sizes() -> list[list[np.ndarray]]:
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region as gather_region
    from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region as scatter_region

    rank, group = start()
    gathered = gather_region(part_of(rank, 2), group=group)
    return [gathered.numpy(), scatter_region(part_of(rank, 4), group=group).numpy()]


def test_equal_parts_need_no_sizes() -> None:
    results = run_ranks(2, without_sizes)
    whole = torch.cat([part_of(0, 2), part_of(1, 2)]).numpy()
    summed = (part_of(0, 4) + part_of(1, 4)).chunk(2)
    for rank, (gathered, scattered) in enumerate(results):
        np.testing.assert_array_equal(gathered, whole)
        np.testing.assert_allclose(scattered, summed[rank].numpy(), atol=1e-6)
