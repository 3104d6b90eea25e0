"""One expert of a layer, whichever way the layer holds its experts."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def expert(experts: Any, index: int) -> Any:
    """`linear_fc1` and `linear_fc2` with `weight` and `bias` of expert `index` of this rank: parts of parameters."""
    if hasattr(experts, "local_experts"):
        return experts.local_experts[index]

    def part(linear: Any) -> SimpleNamespace:
        return SimpleNamespace(weight=linear.weight[index], bias=None if linear.bias is None else linear.bias[index])

    return SimpleNamespace(linear_fc1=part(experts.linear_fc1), linear_fc2=part(experts.linear_fc2))


def naive_mlp(mlp: Any, x: Tensor, swiglu: bool = False) -> Tensor:
    """An MLP in plain torch, from its `linear_fc1` and `linear_fc2`."""
    hidden = F.linear(x, mlp.linear_fc1.weight, mlp.linear_fc1.bias)
    if swiglu:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.gelu(hidden)
    return F.linear(hidden, mlp.linear_fc2.weight, mlp.linear_fc2.bias)


def by_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by parameter name; those of all experts together are taken apart: `experts.linear_fc1.weight[3]`."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "experts.linear_fc" in name and "shared_experts" not in name:
            result |= {f"{name}[{index}]": part for index, part in enumerate(tensor)}
        else:
            result[name] = tensor
    return result


def expert_of(name: str) -> int | None:
    """The number of the expert in a name that `by_expert` made, or None: it is of no expert."""
    return int(name.split("[")[1].rstrip("]")) if "[" in name else None


def gradients_by_expert(loss: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss by the names of `wanted`, zeros where it does not reach; stacked experts taken apart."""
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    return by_expert(dict(zip(wanted, found, strict=True)))
