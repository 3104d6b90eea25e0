"""Tells the modules that change with the training step when one begins and ends."""

from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_attr_wrapped_model


class StepModule(Protocol):
    """A module whose behaviour depends on the step."""

    def begin_step(self, step: int) -> None:
        """A training step begins; the same number, counted from 0, on every rank."""

    def finish_step(self, group: dist.ProcessGroup, *, skipped: bool) -> None:
        """A training step is over; `group`: the ranks that hold copies of the module."""


class StepClock:
    """The step-dependent modules of a model, found once: a large model has tens of thousands of modules.

    Args:
        model: chunks of this rank.
    """

    def __init__(self, model: list[Any]) -> None:
        self._modules: list[StepModule] = [
            module
            for chunk in model
            for module in get_attr_wrapped_model(chunk, "modules")()
            if hasattr(module, "begin_step") and hasattr(module, "finish_step")
        ]

    def begin(self, step: int) -> None:
        """Step number `step` begins, counted from 0."""
        for module in self._modules:
            module.begin_step(step)

    def finish(self, *, skipped: bool) -> None:
        """The step is over; a collective: every rank calls it, in the same state."""
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        for module in self._modules:
            module.finish_step(group, skipped=skipped)
