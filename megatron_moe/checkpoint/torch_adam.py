"""Lets the distributed optimizer load its state into the AdamW of torch (without Apex and Transformer Engine).

AdamW keeps `step` as a tensor of every parameter, which it has after its first step only. Upstream
(`megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer`) minds this in two places: `state_dict` asks for
the step before anything was loaded, and `load_state_dict` gives all parameters the same tensor, so that every
parameter's update would count as a step of all of them.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def fill_empty_states(optimizer: Any) -> None:
    """Give every distributed optimizer that has made no step its state; loading then goes over all of it.

    Upstream makes a step of zero gradients for that (`_init_optimizer_states_with_dummy_values`), which takes as much
    memory again as the masters do.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part.init_state_fn(part.optimizer, part.config)
            if isinstance(part.optimizer, torch.optim.AdamW):
                for state in part.optimizer.state.values():
                    state["step"] = torch.tensor(0.0)


def separate_steps(optimizer: Any) -> None:
    """Give every parameter a step of its own again, once the state is loaded."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Optimizer):
            for state in part.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()
