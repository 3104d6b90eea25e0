"""Activations of experts with their derivatives, for a backward pass that computes them anew instead of keeping them.

Gated (SwiGLU): the first matrix gives gate and value side by side, and `activation(gate) * value` goes on.

Shape legend: R = rows, F = width of the expert, G = 2F where it is gated, else F.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.base import ConfigError

type Derivative = Callable[[Tensor, Tensor, Tensor], None]
"""Writes the gradient of the activation's input into the third, from that of its output and the input."""


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (Primer, arXiv 2109.08668). megatron-core's own is compiled when it is first called."""
    return F.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (GPT-2's `gelu_new`)."""
    return F.gelu(x, approximate="tanh")


def _gelu_tanh_backward(gradient: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(gradient, x, approximate="tanh", grad_input=out)


def _gelu_backward(gradient: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.gelu_backward.grad_input(gradient, x, grad_input=out)


def _silu_backward(gradient: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.silu_backward.grad_input(gradient, x, grad_input=out)


def _relu_backward(gradient: Tensor, x: Tensor, out: Tensor) -> None:
    torch.ops.aten.threshold_backward.grad_input(gradient, x, 0, grad_input=out)


def _squared_relu_backward(gradient: Tensor, x: Tensor, out: Tensor) -> None:
    torch.mul(F.relu(x).mul_(2), gradient, out=out)


DERIVATIVES: dict[Callable[..., Tensor], Derivative] = {
    F.gelu: _gelu_backward,
    gelu_tanh: _gelu_tanh_backward,
    F.silu: _silu_backward,
    F.relu: _relu_backward,
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

    def again(self, h_RG: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The activation [R, F] once more, for the backward pass.

        Returns:
            It, in memory of its own, and the function that makes the gradient of `h_RG` from that of the activation.
        """
        gradient_RG = torch.empty_like(h_RG)
        if not self._gated:

            def backward(gradient_RF: Tensor) -> Tensor:
                self._derivative(gradient_RF, h_RG, gradient_RG)
                return gradient_RG

            return self._function(h_RG), backward
        gate_RF, value_RF = h_RG.chunk(2, dim=-1)
        opened_RF = self._function(gate_RF)

        def gated_backward(gradient_RF: Tensor) -> Tensor:
            gate_gradient_RF, value_gradient_RF = gradient_RG.chunk(2, dim=-1)
            torch.mul(gradient_RF, opened_RF, out=value_gradient_RF)
            self._derivative(gradient_RF.mul_(value_RF), gate_RF, gate_gradient_RF)
            return gradient_RG

        return opened_RF * value_RF, gated_backward
