"""The experts' own autograd function against a loop over experts in torch's operations.

`together` runs what a GPU runs, one `grouped_mm` for all experts, on the CPU's kernel; `one by one` is the CPU's way.

Tolerances, of the largest value of each tensor: fp32 2e-6 (the sum over rows of a bias's gradient is a product with
ones in the one and a sum in the other; all else came out bit for bit); bf16 1e-2, two roundings of 2^-8.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.base import ConfigError
from megatron_moe.moe.experts import functions, products
from megatron_moe.moe.experts.activations import DERIVATIVES, Activation, gelu_tanh, squared_relu
from megatron_moe.moe.experts.functions import ExpertMath, ExpertWeights, expert_mlp

H, WIDTH = 24, 16
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-12}
COUNTS = {
    "skewed": (1, 40, 3, 9),
    "first empty": (0, 5, 2, 6),
    "last empty": (7, 5, 2, 0),
    "one has all": (0, 0, 11, 0),
    "no rows": (0, 0, 0, 0),
    "one expert": (13,),
}
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], bool, bool]] = {
    "GELU": (F.gelu, False, False),
    "GELU with biases": (F.gelu, False, True),
    "SwiGLU": (F.silu, True, False),
    "SwiGLU with biases": (F.silu, True, True),
    "GELU by tanh": (gelu_tanh, False, True),
    "squared ReLU": (squared_relu, False, True),
    "ReLU": (F.relu, False, True),
}


@pytest.fixture(params=["one by one", "together"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(products, "one_by_one", lambda device: request.param == "one by one")
    return request.param


def weights_of(experts: int, kind: str, dtype: torch.dtype) -> ExpertWeights:
    _, gated, bias = KINDS[kind]
    width = 2 * WIDTH if gated else WIDTH

    def draw(*shape: int) -> Tensor:
        return (0.5 * torch.randn(shape)).to(dtype).requires_grad_()

    fc1, fc2 = draw(experts, width, H), draw(experts, H, WIDTH)
    return ExpertWeights(fc1, draw(experts, width) if bias else None, fc2, draw(experts, H) if bias else None)


def loop(
    x: Tensor, probs: Tensor, counts: tuple[int, ...], mask: Tensor | None, weights: ExpertWeights, kind: str
) -> Tensor:
    """An expert after the other, as upstream's MLP.forward in torch's operations."""
    function, gated, _ = KINDS[kind]
    start, outputs = 0, []
    for index, count in enumerate(counts):
        rows, scale = x[start : start + count], probs[start : start + count, None]
        bias1 = None if weights.bias1_EG is None else weights.bias1_EG[index]
        hidden = F.linear(rows, weights.fc1_EGH[index])
        if bias1 is not None:
            hidden = hidden + bias1
        if gated:
            gate, value = hidden.chunk(2, dim=-1)
            a = function(gate) * value
        else:
            a = function(hidden)
        a = (a * scale).to(x.dtype)
        if mask is not None:
            a = a * mask[start : start + count] * 2
        out = F.linear(a, weights.fc2_EHF[index])
        if weights.bias2_EH is not None:
            out = (out + weights.bias2_EH[index] * scale).to(x.dtype)
        outputs.append(out)
        start += count
    return torch.cat(outputs)


class Case:
    """Rows, weights and both sides' results."""

    def __init__(self, kind: str, counts: tuple[int, ...], dtype: torch.dtype, *, masked: bool = False) -> None:
        torch.manual_seed(0)
        rows = sum(counts)
        self.kind, self.counts = kind, counts
        self.x = torch.randn(rows, H).to(dtype).requires_grad_()
        self.probs = torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
        self.mask = torch.rand(rows, WIDTH) < 0.5 if masked else None
        self.weights = weights_of(len(counts), kind, dtype)
        self.gradient = torch.randn(rows, H).to(dtype)
        function, gated, _ = KINDS[kind]
        self.math = ExpertMath(Activation(function, gated=gated), 0.5, 1, keep=True)
        self.ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)

    @property
    def wanted(self) -> dict[str, Tensor]:
        found = {"x": self.x, "probs": self.probs, **vars(self.weights)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def gradients(self, output: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            output, list(self.wanted.values()), self.gradient, materialize_grads=True, allow_unused=True
        )
        return {"output": output} | dict(zip(self.wanted, found, strict=True))

    def ours(self) -> Tensor:
        return expert_mlp(self.x, self.probs, self.ends, self.mask, self.weights, self.math)

    def check(self) -> None:
        ours = self.gradients(self.ours())
        theirs = self.gradients(loop(self.x, self.probs, self.counts, self.mask, self.weights, self.kind))
        for name, expected in theirs.items():
            assert ours[name].shape == expected.shape
            assert ours[name].dtype == expected.dtype
            if expected.numel():
                error, size = (ours[name] - expected).abs().max(), expected.abs().max()
                assert error <= TOLERANCE[expected.dtype if name != "probs" else self.x.dtype] * size, name


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop(kind: str, counts: str, way: str) -> None:
    Case(kind, COUNTS[counts], torch.float32).check()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_loop_in_bf16(kind: str, way: str) -> None:
    Case(kind, COUNTS["skewed"], torch.bfloat16).check()


@pytest.mark.parametrize("kind", ["GELU with biases", "SwiGLU"])
def test_equals_a_loop_with_dropout(kind: str, way: str) -> None:
    Case(kind, COUNTS["skewed"], torch.float32, masked=True).check()


def test_every_activation_is_tested() -> None:
    assert {function for function, _, _ in KINDS.values()} == set(DERIVATIVES)


def test_other_activations_are_refused() -> None:
    known = "gelu, gelu_tanh, relu, silu, squared_relu"
    with pytest.raises(ConfigError, match=f"activation tanh: grouped experts have {known}"):
        Activation(torch.tanh, gated=False)


def product_in_fp64(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """What `grouped_mm` computes; its kernels take no fp64, which `gradcheck` needs."""
    bounds = [0, *offs.tolist()]
    parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    if b.dim() == 3:
        return torch.cat([a[part] @ matrix for part, matrix in zip(parts, b, strict=True)])
    return torch.stack([a[:, part] @ b[part] for part in parts])


@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, masked: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivatives by finite differences in fp64, with an empty expert among them."""
    monkeypatch.setattr(products.F, "grouped_mm", product_in_fp64)
    monkeypatch.setattr(sys.modules[__name__], "H", 3)
    monkeypatch.setattr(sys.modules[__name__], "WIDTH", 2)
    case = Case(kind, (2, 0, 3), torch.float64, masked=masked)

    def run(x: Tensor, probs: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(list(case.wanted)[2:], parameters, strict=True))
        weights = ExpertWeights(**{name: named.get(name) for name in vars(case.weights)})
        return expert_mlp(x, probs, case.ends, case.mask, weights, case.math)

    assert torch.autograd.gradcheck(run, tuple(case.wanted.values()), fast_mode=False)


def test_each_rank_adds_its_share_of_the_bias(way: str) -> None:
    """Two ranks' outputs sum up to the whole bias, while either has its whole gradient."""
    case = Case("GELU with biases", COUNTS["skewed"], torch.float32)
    whole = case.gradients(case.ours())
    case.math = ExpertMath(case.math.activation, 0.5, 2, keep=True)
    half = case.gradients(case.ours())
    experts_R = torch.repeat_interleave(torch.arange(4), torch.tensor(case.counts))
    assert case.weights.bias2_EH is not None
    left_out = 0.5 * case.weights.bias2_EH[experts_R] * case.probs[:, None]
    torch.testing.assert_close(half["output"] + left_out, whole["output"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(half["bias2_EH"], whole["bias2_EH"], rtol=1e-5, atol=1e-5)
    lost = 0.5 * (case.gradient * case.weights.bias2_EH[experts_R]).sum(dim=-1)
    torch.testing.assert_close(half["probs"] + lost, whole["probs"], rtol=1e-5, atol=1e-5)


# ---- memory


@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_keeps_what_the_formula_says(kind: str, dtype: torch.dtype, masked: bool, way: str) -> None:
    """Bytes that are kept for the backward pass, beside the weights and where the experts' rows end."""
    case = Case(kind, COUNTS["skewed"], dtype, masked=masked)
    kept: dict[int, int] = {}
    weights = {tensor.data_ptr() for tensor in vars(case.weights).values() if tensor is not None}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights | {case.ends.data_ptr()}:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.ours()
    _, gated, _ = KINDS[kind]
    row = dtype.itemsize * (H + (2 if gated else 1) * WIDTH) + 4 + (WIDTH if masked else 0)
    assert sum(kept.values()) == row * sum(case.counts)


def test_keeps_nothing_without_a_backward_pass(way: str) -> None:
    case = Case("SwiGLU", COUNTS["skewed"], torch.float32)
    math = ExpertMath(case.math.activation, 0.0, 1, keep=False)
    with torch.no_grad():
        kept, output = functions._forward(functions._Rows(case.x, case.probs, None), case.ends, case.weights, math)
    assert kept is None
    assert torch.equal(output, case.ours())


# ---- gradients into megatron-core's buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["SwiGLU", "GELU with biases"])
def test_adds_to_main_grad(kind: str, dtype: torch.dtype, way: str) -> None:
    """Two micro-batches add up; autograd is given something of the parameter's shape, which upstream's hook drops."""
    case = Case(kind, COUNTS["first empty"], dtype)
    plain = case.gradients(case.ours())
    parameters = {name: tensor for name, tensor in vars(case.weights).items() if tensor is not None}
    for parameter in parameters.values():
        parameter.main_grad = torch.full(parameter.shape, 3.0)
        parameter.grad_added_to_main_grad = False
    for _ in range(2):
        case.ours().backward(case.gradient)
    for name, parameter in parameters.items():
        assert parameter.grad_added_to_main_grad
        assert parameter.grad is not None
        assert parameter.grad.shape == parameter.shape
        found, expected = parameter.main_grad - 3, 2 * plain[name].float()
        # 3 + a number loses what the number has beyond 2^-22.
        assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max() + 2e-6, name


def test_frozen_weights_have_no_gradient(way: str) -> None:
    case = Case("GELU with biases", COUNTS["skewed"], torch.float32)
    expected = case.gradients(case.ours())
    for parameter in vars(case.weights).values():
        parameter.main_grad, parameter.grad_added_to_main_grad = torch.zeros_like(parameter), False
    case.weights.fc1_EGH.requires_grad_(False)
    case.weights.bias2_EH.requires_grad_(False)  # type: ignore[union-attr]
    case.ours().backward(case.gradient)
    assert not case.weights.fc1_EGH.main_grad.any()
    assert case.weights.fc1_EGH.grad is None
    assert torch.equal(case.weights.fc2_EHF.main_grad, expected["fc2_EHF"])
    assert torch.equal(case.x.grad, expected["x"])  # type: ignore[arg-type]


def test_a_gradient_need_not_be_contiguous(way: str) -> None:
    case = Case("SwiGLU", COUNTS["skewed"], torch.float32)
    expected = case.gradients(case.ours())
    case.gradient = case.gradient.t().contiguous().t()
    assert not case.gradient.is_contiguous()
    found: dict[str, Any] = case.gradients(case.ours())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
