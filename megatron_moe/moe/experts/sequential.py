"""Experts: megatron-core's `SequentialMLP`, with expert dropout, and the output bias counted once under expert tensor
parallelism.

With ETP ranks each expert's second matrix is split by rows; the partial products are summed by the dispatcher when
tokens return. Upstream adds the whole bias on every rank before that sum, so it counts ETP times
(`megatron/core/transformer/mlp.py:MLP.forward`), and marks it `sequence_parallel`, so that gradients of different
experts would be summed over the tensor-parallel group (`tensor_parallel/layers.py:RowParallelLinear.__init__`).
"""

from functools import partial
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from torch import Tensor


class ExpertRowParallelLinear(RowParallelLinear):
    """Second linear layer of an expert."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The dispatcher sums the ranks' partial products; with one rank there is nothing to sum, and going through
        # upstream's all-reduce would return a view that MLP.forward may not add the bias to in place.
        self.explicit_expert_comm = True
        if self.bias is not None:
            # Every rank of the expert's group sees all its tokens, so every rank has the whole gradient already.
            self.bias.sequence_parallel = False

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Partial product [tokens, H] and this rank's share of the bias [H].

        The share is bias / ETP in value, while the gradient stays that of the whole bias.
        """
        output, bias = super().forward(self._dropout(input_))
        ranks = self.tp_group.size()
        if bias is None or ranks == 1:
            return output, bias
        return output, bias + (bias / ranks - bias).detach()

    def _dropout(self, activation: Tensor) -> Tensor:
        """Switch Transformer's expert dropout: inside the expert, in training only.

        Each rank of an expert's group holds other channels and draws other numbers; recompute draws the same ones
        again (upstream's `tensor_parallel.checkpoint` puts the tracker back).
        """
        share = self.config.moe.moe_expert_dropout
        if share == 0.0 or not self.training:
            return activation
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            return F.dropout(activation, share)


def sequential_experts() -> ExpertsBuilder:
    """Builder of a loop over this rank's experts: the reference that every faster implementation must equal."""
    return partial(
        SequentialMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=ExpertRowParallelLinear),
    )
