"""Collectives that NCCL has and gloo lacks: gathers and reduce-scatters of unequal parts.

Experts under expert tensor parallelism exchange as many tokens as each rank happens to have
(`transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher.dispatch_postprocess`). `cpu.py` puts these in the
place of two functions of `tensor_parallel/mappings.py`, to which equal parts still go.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_along_first_dim(upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`_gather_along_first_dim` that also takes unequal parts: each is padded to the largest for the exchange."""

    def gather(
        input_: Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return upstream(input_, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = input_.new_zeros((max(sizes), *input_.shape[1:]))
        padded[: input_.shape[0]] = input_
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    return gather


def reduce_scatter_along_first_dim(upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`_reduce_scatter_along_first_dim` that also takes unequal parts: all are summed, this rank's is kept."""

    def reduce_scatter(
        input_: Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return upstream(input_, group, input_split_sizes, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        summed = input_.clone()
        dist.all_reduce(summed, group=group)
        return summed.split(sizes)[group.rank()].clone()

    return reduce_scatter
