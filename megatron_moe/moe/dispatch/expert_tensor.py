"""Rows under expert tensor parallelism: every rank of an expert works on the rows of all of them.

The same as `token_dispatcher.py:MoEAlltoAllTokenDispatcher` does after and before its exchange.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor


def gather_rows(rows: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
    """The rows of all ranks of the group, which have `sizes` of them."""
    gathered: Tensor = gather_from_sequence_parallel_region(rows, group=group, output_split_sizes=list(sizes))
    return gathered


def reduce_scatter_rows(rows: Tensor, group: dist.ProcessGroup, sizes: Sequence[int], sum_type: torch.dtype) -> Tensor:
    """This rank's rows, summed over the ranks of the group in `sum_type`."""
    summed: Tensor = reduce_scatter_to_sequence_parallel_region(
        rows.to(sum_type), group=group, input_split_sizes=list(sizes)
    )
    return summed.to(rows.dtype)
