"""What every router has: its tokens' inputs, the step it is in, and counters of what the experts received.

`PyramidMoELayer` calls a router with the hidden states and what `moe/inputs.py` knows of them. A router returns, for
its N tokens and E experts, the weights and the map of assignments that megatron-core's dispatchers take.

Shape legend: S = sequence on this rank, B = batch, N = S * B tokens, E = experts of this layer, H = hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_moe.moe.inputs import RoutingInputs


@dataclass(frozen=True)
class RouterStart:
    """What a router's fixed tables are made of when a run starts; later they come from the checkpoint."""

    seed: int
    vocab_size: int
    """Padded."""
    token_counts: Tensor | None
    """[V] how often each token id occurs, or [domains, V], or None."""


class CountingRouter(MegatronModule):
    """Base of all routers; put it before megatron-core's class.

    A subclass calls `start_counting` at the end of `__init__`, and `count` once for every micro-batch.

    Attributes:
        step: of the run, counted from 0; `begin_step` sets it.
        fp32_buffers: names of what a half type is too coarse for: counters go past 256.
        inputs: of the tokens at hand; the layer sets them before it calls the router.
    """

    step: int = 0
    fp32_buffers: tuple[str, ...] = ("load_counters",)
    inputs: RoutingInputs | None = None
    layer_number: int | None
    config: Any

    def start_counting(self, experts: int) -> None:
        """Make the counters."""
        # Tokens per expert, then assignments that were dropped, then those that another expert took over.
        counters = torch.zeros(experts + 2, dtype=torch.float32, device=torch.cuda.current_device())
        self.register_buffer("load_counters", counters, persistent=False)
        self.load_counters: Tensor

    def start_run(self, start: RouterStart) -> None:
        """Draw fixed tables, for a run that does not begin with a checkpoint. Nothing by default."""

    def begin_step(self, step: int) -> None:
        """A training step begins; the same number on every rank."""
        self.step = step

    def finish_step(self, group: dist.ProcessGroup, *, skipped: bool) -> None:
        """A training step is over; a collective over `group`, the ranks that hold copies of this router.

        Args:
            group: tensor-, data- and context-parallel ranks.
            skipped: the weights were left as they were, so must be everything else.
        """

    def count(self, map_NE: Tensor, *, dropped: Tensor | int = 0, recycled: Tensor | int = 0) -> None:
        """Add a micro-batch's assignments. Under recompute the first pass has no gradients: each is counted once."""
        if not (self.training and torch.is_grad_enabled()):
            return
        with torch.no_grad():
            self.load_counters[:-2] += map_NE.sum(dim=0)
            self.load_counters[-2] += dropped
            self.load_counters[-1] += recycled

    def take_load(self) -> Tensor:
        """Tokens per expert [E], then dropped and recycled assignments since the last call, on this rank."""
        counters = self.load_counters.clone()
        self.load_counters.zero_()
        return counters

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Keep `fp32_buffers` as they are, unrounded, when the module is converted to a half type."""
        before = {name: getattr(self, name) for name in self.fp32_buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return self
