"""Activations of experts with their derivatives, for a backward pass that computes them anew instead of keeping them.

Gated (SwiGLU): the first matrix gives gate and value side by side, and `activation(gate) * value` goes on.

Shape legend: R = rows, F = width of the expert, G = 2F where it is gated, else F.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.base import ConfigError

type Derivative = Callable[[Tensor, Tensor], Tensor]
"""From the gradient of the activation's output and its input, the gradient of its input."""


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668). megatron-core's own is compiled when it is first called."""
    return F.relu(x).square()


def _squared_relu_backward(gradient: Tensor, x: Tensor) -> Tensor:
    return F.relu(x).mul_(2).mul_(gradient)


DERIVATIVES: dict[Callable[..., Tensor], Derivative] = {
    F.gelu: torch.ops.aten.gelu_backward,
    F.silu: torch.ops.aten.silu_backward,
    F.relu: lambda gradient, x: torch.ops.aten.threshold_backward(gradient, x, 0),
    squared_relu: _squared_relu_backward,
}


class Activation:
    """What stands between the two matrices of an expert.

    Args:
        function: `config.activation_func`.
        gated: `config.gated_linear_unit`.

    Raises:
        ConfigError: the derivative of the function is not known here.
    """

    def __init__(self, function: Callable[..., Tensor], *, gated: bool) -> None:
        if function not in DERIVATIVES:
            known = ", ".join(sorted(getattr(known, "__name__", str(known)) for known in DERIVATIVES))
            raise ConfigError(
                f"activation {getattr(function, '__name__', function)}: grouped experts have {known}; "
                "--moe-expert-backend sequential takes any"
            )
        self._function, self._derivative, self._gated = function, DERIVATIVES[function], gated

    def forward(self, h_RG: Tensor) -> Tensor:
        """The activation [R, F], in memory of its own."""
        if not self._gated:
            return self._function(h_RG)
        gate_RF, value_RF = h_RG.chunk(2, dim=-1)
        return self._function(gate_RF).mul_(value_RF)

    def backward(self, gradient_RF: Tensor, h_RG: Tensor) -> Tensor:
        """Gradient of the input [R, G] from that of the output."""
        if not self._gated:
            return self._derivative(gradient_RF, h_RG)
        gate_RF, value_RF = h_RG.chunk(2, dim=-1)
        result_RG = torch.empty_like(h_RG)
        gate_gradient_RF, value_gradient_RF = result_RG.chunk(2, dim=-1)
        gate_gradient_RF.copy_(self._derivative(gradient_RF * value_RF, gate_RF))
        torch.mul(gradient_RF, self._function(gate_RF), out=value_gradient_RF)
        return result_RG
