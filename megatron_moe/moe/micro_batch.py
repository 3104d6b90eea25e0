"""A whole micro-batch of router scores on every rank that holds a part of it.

Routers that share experts out among all tokens (recycle, base, expert-choice, balanced margins) need to see the
micro-batch that tensor, sequence and context parallelism have cut up. Its tokens are put into one order, by sample and
place, so that the outcome does not depend on the layout.

Shape legend: N = tokens of this rank, M = tokens of the micro-batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.inputs import RoutingInputs


class WholeMicroBatch:
    """Gathers rows of this rank's tokens into the micro-batch's order, and hands rows back.

    Args:
        inputs: of this rank's N tokens.
        group: ranks that hold different tokens of the micro-batch (`None` or a single one: this rank has them all).
    """

    def __init__(self, inputs: RoutingInputs, group: dist.ProcessGroup | None) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        sample_M, place_M = self._gather(inputs.sample), self._gather(inputs.place)
        # Stable twice: by place, then by sample.
        order_M = torch.argsort(place_M, stable=True)
        order_M = order_M[torch.argsort(sample_M[order_M], stable=True)]
        self._order_M = order_M
        rank = self._group.rank() if self._group is not None else 0
        count = inputs.token.shape[0]
        where_M = torch.empty_like(order_M)
        where_M[order_M] = torch.arange(order_M.numel(), device=order_M.device)
        self._mine_N = where_M[rank * count : (rank + 1) * count]
        self.inputs = RoutingInputs(
            token=self.gather(inputs.token),
            place=place_M[order_M],
            sample=sample_M[order_M],
            domain=self.gather(inputs.domain),
        )
        """Of all M tokens, in order."""

    @property
    def size(self) -> int:
        """M."""
        return self._order_M.numel()

    def gather(self, x_N: Tensor) -> Tensor:
        """[M, ...] in order, from every rank's [N, ...]; without a gradient."""
        return self._gather(x_N)[self._order_M]

    def mine(self, x_M: Tensor) -> Tensor:
        """This rank's rows [N, ...] of [M, ...]."""
        return x_M[self._mine_N]

    @torch.no_grad()
    def _gather(self, x_N: Tensor) -> Tensor:
        if self._group is None:
            return x_N.detach()
        x_N = x_N.detach().contiguous()
        out = x_N.new_empty((self._group.size() * x_N.shape[0], *x_N.shape[1:]))
        dist.all_gather_into_tensor(out.view(-1), x_N.view(-1), group=self._group)
        return out
