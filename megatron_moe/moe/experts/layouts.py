"""Three layouts of experts in a plain `state_dict`, and the ways between them.

    stacked         linear_fc1.weight [E, out, in]
    sequential      local_experts.{i}.linear_fc1.weight [out, in]      upstream's SequentialMLP
    te              linear_fc1.weight{i} [out, in]                     upstream's TEGroupedMLP

(Sharded checkpoints have one layout for all: `sharding.py`.) Nothing but names and tensors here.
"""

import re
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_moe.config.base import UserError

type Layout = Literal["stacked", "sequential", "te"]

LINEARS = ("linear_fc1", "linear_fc2")
EXTRA_STATE = "_extra_state"

_STACKED = re.compile(r"(?P<name>linear_fc[12]\.(?:weight|bias))")
_SEQUENTIAL = re.compile(r"local_experts\.(?P<expert>\d+)\.(?P<name>linear_fc[12]\.(?:weight|bias))")
_TE = re.compile(r"(?P<name>linear_fc[12]\.(?:weight|bias))(?P<expert>\d+)")
_EMPTY = re.compile(rf"(local_experts\.\d+\.)?linear_fc[12]\.{EXTRA_STATE}\d*")
_PATTERNS: dict[str, re.Pattern[str]] = {"stacked": _STACKED, "sequential": _SEQUENTIAL, "te": _TE}


def convert(state: dict[str, Any], layout: Layout) -> dict[str, Tensor]:
    """The experts of one layer in another layout; views where they can be.

    Args:
        state: tensors of an experts module in any layout, by their names inside of it. The empty `_extra_state` of
            upstream's linear layers is left out.
        layout: of the result.

    Raises:
        UserError: a name is in none of the layouts, layouts are mixed, or an expert is missing.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in stacked(state).items():
        if layout == "stacked":
            result[name] = tensor
            continue
        for expert, part in enumerate(tensor):
            key = f"local_experts.{expert}.{name}" if layout == "sequential" else f"{name}{expert}"
            result[key] = part
    return result


def stacked(state: dict[str, Any]) -> dict[str, Tensor]:
    """One tensor for all experts from any of the layouts; see `convert`."""
    result: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    layouts = {}
    for key, value in state.items():
        if _EMPTY.fullmatch(key):
            continue
        layout, match = _recognize(key)
        layouts[layout] = key
        if layout == "stacked":
            result[match["name"]] = value
        else:
            experts.setdefault(match["name"], {})[int(match["expert"])] = value
    if len(layouts) > 1:
        raise UserError(f"experts in several layouts at once: {', '.join(layouts.values())}")
    counts = {name: max(parts) + 1 for name, parts in experts.items()}
    for name, parts in experts.items():
        missing = sorted(set(range(max(counts.values()))) - set(parts))
        if missing:
            raise UserError(f"{name} of expert {missing[0]} is missing; there are {max(counts.values())} experts")
        result[name] = torch.stack([parts[expert] for expert in range(len(parts))])
    return result


def _recognize(key: str) -> tuple[str, re.Match[str]]:
    for layout, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(key):
            return layout, match
    raise UserError(f"{key}: is not a tensor of experts")


def load_any_layout(
    module: torch.nn.Module,
    state: dict[str, Any],
    prefix: str,
    metadata: dict[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """A hook for `load_state_dict` of stacked experts, which takes every layout; torch then checks names and shapes."""
    own = {key.removeprefix(prefix): key for key in state if key.startswith(prefix)}
    try:
        tensors = stacked({name: state[key] for name, key in own.items()})
    except UserError as error:
        errors.append(f"{prefix}: {error}")
        return
    for key in own.values():
        del state[key]
    state.update({f"{prefix}{name}": tensor for name, tensor in tensors.items()})
