"""Forward and backward of all experts of a rank in one autograd function that keeps as little as it can.

For every row r of expert e, as `megatron/core/transformer/mlp.py:MLP.forward` with `per_token_scale`:

    h = W1[e] x + b1[e];  a = dropout(prob * activation(h));  y = W2[e] a + prob * b2[e] / ranks

Kept for the backward pass, in bytes a row:

    s * (H + G) + p   (+ F with expert dropout)

with s bytes a number (4 in fp32, 2 in bf16), G = 2F for gated experts and F otherwise, p bytes of a routing weight. The
activation is computed anew, and nothing less will do without doing a matrix product again: the gradient of W1 needs x,
that of the activation needs h. (SwiGLU in torch's own operations keeps s * (H + 2G + 2F) + p: 2.6 times as much where
F = 2H.)

Weight gradients go straight to `main_grad`, megatron-core's fp32 buffer, where there is one: a gradient of the weights'
size that lives for one addition costs more than the product when memory is slow to get. `distributed_data_parallel.py:
DistributedDataParallel._make_backward_post_hook` then finds `grad_added_to_main_grad` set, as upstream's
`tensor_parallel/layers.py:LinearWithGradAccumulationAndAsyncCommunication` sets it.

Shape legend: R = rows, H = hidden size, F = width of an expert on this rank, G = see above, E = this rank's experts.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_moe.moe.experts import products
from megatron_moe.moe.experts.activations import Activation
from megatron_moe.moe.experts.products import Place


@dataclass(frozen=True)
class ExpertMath:
    """What is the same for every row."""

    activation: Activation
    dropout: float
    """Share of the activation that is dropped where there is a mask."""
    ranks: int
    """Ranks that an expert is split over; their outputs are summed later, so each adds its share of the bias."""
    keep: bool
    """Whether there will be a backward pass."""


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked weights of a rank's experts."""

    fc1_EGH: Any
    bias1_EG: Tensor | None
    fc2_EHF: Any
    bias2_EH: Tensor | None


@dataclass(frozen=True)
class _Rows:
    x_RH: Tensor
    probs_R: Tensor
    mask_RF: Tensor | None
    h_RG: Tensor | None = None

    @property
    def probs_R1(self) -> Tensor:
        return self.probs_R.unsqueeze(-1)

    def part(self, block: slice) -> "_Rows":
        mask_RF, h_RG = (None if tensor is None else tensor[block] for tensor in (self.mask_RF, self.h_RG))
        return _Rows(self.x_RH[block], self.probs_R[block], mask_RF, h_RG)


def expert_mlp(
    x_RH: Tensor, probs_R: Tensor, ends_E: Tensor, mask_RF: Tensor | None, weights: ExpertWeights, math: ExpertMath
) -> Tensor:
    """Output of the experts [R, H].

    Args:
        x_RH: rows, sorted by expert.
        probs_R: routing weights.
        ends_E: int32, where every expert's rows end.
        mask_RF: expert dropout, True where the activation stays; None: no dropout.
        weights: of the experts.
        math: what is computed.
    """
    y_RH: Tensor = _ExpertMlp.apply(
        x_RH, probs_R, weights.fc1_EGH, weights.bias1_EG, weights.fc2_EHF, weights.bias2_EH, ends_E, mask_RF, math
    )
    return y_RH


class _ExpertMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RH: Tensor,
        probs_R: Tensor,
        fc1_EGH: Tensor,
        bias1_EG: Tensor | None,
        fc2_EHF: Tensor,
        bias2_EH: Tensor | None,
        ends_E: Tensor,
        mask_RF: Tensor | None,
        math: ExpertMath,
    ) -> Tensor:
        weights = ExpertWeights(fc1_EGH, bias1_EG, fc2_EHF, bias2_EH)
        rows = _Rows(x_RH, probs_R, mask_RF)
        h_RG, y_RH = _forward(rows, ends_E, _with_share_of_bias(weights, math), math)
        ctx.math, ctx.parameters = math, (fc1_EGH, bias1_EG, fc2_EHF, bias2_EH)
        ctx.save_for_backward(x_RH, probs_R, mask_RF, h_RG, ends_E, *ctx.parameters)
        return y_RH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_RH: Tensor) -> tuple[Tensor | None, ...]:
        x_RH, probs_R, mask_RF, h_RG, ends_E, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:6]
        targets = [_target(parameter) if need else None for parameter, need in zip(ctx.parameters, needed, strict=True)]
        x_gradient_RH, probs_gradient_R = _backward(
            gradient_RH.contiguous(),
            _Rows(x_RH, probs_R, mask_RF, h_RG),
            ends_E,
            _with_share_of_bias(ExpertWeights(*weights), ctx.math),
            ExpertWeights(*targets),
            ctx.math,
        )
        given = [_given(parameter, target) for parameter, target in zip(ctx.parameters, targets, strict=True)]
        return x_gradient_RH, probs_gradient_R, *given, None, None, None


def _forward(rows: _Rows, ends_E: Tensor, weights: ExpertWeights, math: ExpertMath) -> tuple[Tensor | None, Tensor]:
    """h, if there will be a backward pass, and y."""
    blocks = products.blocks(ends_E, len(rows.x_RH))
    if blocks is None:
        h_RG, y_RH = _forward_block(rows, weights, ends_E, math)
        return h_RG if math.keep else None, y_RH
    count = len(rows.x_RH)
    y_RH = rows.x_RH.new_empty(count, weights.fc2_EHF.shape[1])
    kept_RG = rows.x_RH.new_empty(count, weights.fc1_EGH.shape[1]) if math.keep else None
    for block, expert in blocks:
        out = (None if kept_RG is None else kept_RG[block], y_RH[block])
        _forward_block(rows.part(block), weights, expert, math, out)
    return kept_RG, y_RH


def _forward_block(
    rows: _Rows,
    weights: ExpertWeights,
    place: Place,
    math: ExpertMath,
    out: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, Tensor]:
    h = products.product(rows.x_RH, weights.fc1_EGH.mT, place, out=out[0])
    if weights.bias1_EG is not None:
        h.add_(products.of_rows(weights.bias1_EG, place, len(h)))
    a = _scaled(math.activation.forward(h), rows, math)
    y = products.product(a, weights.fc2_EHF.mT, place, out=out[1])
    if weights.bias2_EH is not None:
        y.add_(products.of_rows(weights.bias2_EH, place, len(y)) * rows.probs_R1)
    return h, y


def _backward(
    gradient_RH: Tensor,
    rows: _Rows,
    ends_E: Tensor,
    weights: ExpertWeights,
    targets: ExpertWeights,
    math: ExpertMath,
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and routing weights; those of the parameters are added to the targets."""
    blocks = products.blocks(ends_E, len(rows.x_RH))
    if blocks is None:
        return _backward_block(gradient_RH, rows, weights, targets, ends_E, math)
    x_gradient_RH, probs_gradient_R = torch.empty_like(rows.x_RH), torch.empty_like(rows.probs_R)
    for block, expert in blocks:
        _, probs_gradient_R[block] = _backward_block(
            gradient_RH[block], rows.part(block), weights, targets, expert, math, x_gradient_RH[block]
        )
    return x_gradient_RH, probs_gradient_R


def _backward_block(
    dy: Tensor,
    rows: _Rows,
    weights: ExpertWeights,
    targets: ExpertWeights,
    place: Place,
    math: ExpertMath,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert rows.h_RG is not None
    wide = rows.probs_R.dtype
    a, through_activation = math.activation.again(rows.h_RG)
    da = _dropped(products.product(dy, weights.fc2_EHF, place), rows, math)
    dprobs = (da.to(wide) * a).sum(dim=-1)
    if targets.fc2_EHF is not None:
        products.add_weight_gradient(targets.fc2_EHF, dy, _scaled(a, rows, math), place)
    if weights.bias2_EH is not None:
        dprobs += (dy.to(wide) * products.of_rows(weights.bias2_EH, place, len(dy))).sum(dim=-1)
        if targets.bias2_EH is not None:
            products.add_sum_of_rows(targets.bias2_EH, dy * rows.probs_R1, place)
    dh = through_activation(da.mul_(rows.probs_R1))
    if targets.bias1_EG is not None:
        products.add_sum_of_rows(targets.bias1_EG, dh, place)
    if targets.fc1_EGH is not None:
        products.add_weight_gradient(targets.fc1_EGH, dh, rows.x_RH, place)
    return products.product(dh, weights.fc1_EGH, place, out=out), dprobs


def _scaled(activation_RF: Tensor, rows: _Rows, math: ExpertMath) -> Tensor:
    """Routing weight and dropout, in place; the product is taken in the wider of both precisions and rounded once."""
    return _dropped(activation_RF.mul_(rows.probs_R1), rows, math)


def _dropped(activation_RF: Tensor, rows: _Rows, math: ExpertMath) -> Tensor:
    """Expert dropout, in place."""
    if rows.mask_RF is None:
        return activation_RF
    return activation_RF.mul_(rows.mask_RF).mul_(1.0 / (1.0 - math.dropout))


def _with_share_of_bias(weights: ExpertWeights, math: ExpertMath) -> ExpertWeights:
    if weights.bias2_EH is None or math.ranks == 1:
        return weights
    return replace(weights, bias2_EH=weights.bias2_EH / math.ranks)


def _target(parameter: Tensor | None) -> Tensor | None:
    """Where the gradient of a parameter is added up."""
    if parameter is None:
        return None
    return parameter.main_grad if _has_main_grad(parameter) else torch.zeros_like(parameter)  # type: ignore[attr-defined]


def _given(parameter: Tensor | None, target: Tensor | None) -> Tensor | None:
    """What autograd is told is the gradient: what was added up, or, if that is in `main_grad`, something of its shape.

    Upstream's hook wants a gradient to be there, and throws it away.
    """
    if parameter is None or target is None or not _has_main_grad(parameter):
        return target
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(parameter)


def _has_main_grad(parameter: Tensor) -> bool:
    return hasattr(parameter, "main_grad") and hasattr(parameter, "grad_added_to_main_grad")
