"""A whole micro-batch of router scores on every rank that holds a part of it.

Routers that share experts out among all tokens (recycle, base, expert-choice, balanced margins) need to see the
micro-batch that sequence and context parallelism have cut up. Its tokens are put into one order, by place and then by
sample, which is the order of a rank that holds them all: the outcome does not depend on the layout.

Shape legend: N = tokens of this rank, M = tokens of the micro-batch.
"""

from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_moe.moe.inputs import RoutingInputs


class WholeMicroBatch:
    """Gathers rows of this rank's tokens into the micro-batch's order, and hands rows back.

    Args:
        inputs: of this rank's N tokens; every rank has as many.
        group: ranks that hold different tokens of the micro-batch (`None` or a single one: this rank has them all).

    Attributes:
        inputs: of all M tokens, in order.
    """

    def __init__(self, inputs: RoutingInputs, group: dist.ProcessGroup | None) -> None:
        self._group = group if group is not None and group.size() > 1 else None
        channels_MK = self._gather(torch.stack([inputs.token, inputs.place, inputs.sample, inputs.domain], dim=1))
        # Stable twice: by sample, then by place.
        order_M = torch.argsort(channels_MK[:, 2], stable=True)
        order_M = order_M[torch.argsort(channels_MK[order_M, 1], stable=True)]
        self._order_M = order_M
        rank = self._group.rank() if self._group is not None else 0
        count = inputs.token.shape[0]
        where_M = torch.empty_like(order_M)
        where_M[order_M] = torch.arange(order_M.numel(), device=order_M.device)
        self._mine_N = where_M[rank * count : (rank + 1) * count]
        self.inputs = RoutingInputs(*channels_MK[order_M].unbind(dim=1))

    @classmethod
    def of(cls, router: Any) -> Self:
        """The micro-batch that a megatron-core `Router` with inputs is working on, whichever ranks have parts of it."""
        assert router.inputs is not None, "the micro-batch has an order by its tokens: the layer needs routing inputs"
        return cls(router.inputs, router.tp_cp_group if router.config.sequence_parallel else router.cp_group)

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
