"""Lets the distributed optimizer load its state into the AdamW of torch (without Apex and Transformer Engine).

AdamW keeps `step` as a tensor of every parameter, which it has after its first step only. Upstream
(`megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer`) minds this in three places: `state_dict` asks for
the step before anything was loaded; `_set_main_param_and_optimizer_states` looks for it among the tensors of a
checkpoint, where it is not, as it comes with the parameter groups; and `load_state_dict` gives all parameters the same
tensor, so that every parameter's update would count as a step of all of them.
"""

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_moe.runtime.replace import Replacement

_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def set_states_without_step(optimizer: Any, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
    """Upstream's method; an entry that is no tensor is left as it is."""
    _set_states(optimizer, model_param, {"step": None, **tensors})


REPLACEMENT = Replacement(
    "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer",
    "_set_main_param_and_optimizer_states",
    set_states_without_step,
    "it looks for the step of torch's AdamW among the tensors of a checkpoint",
)


def fill_empty_states(optimizer: Any) -> None:
    """Give every distributed optimizer that has made no step its state; loading then replaces all of it."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and not part.optimizer.state:
            part._init_optimizer_states_with_dummy_values()


def separate_steps(optimizer: Any) -> None:
    """Give every parameter a step of its own again, once the state is loaded."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.Optimizer):
            for state in part.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()
