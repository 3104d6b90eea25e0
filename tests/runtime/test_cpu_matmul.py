"""fp32 products through oneDNN: equal to torch's within rounding, in every layout, and only where they are wanted."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.runtime import cpu_matmul

SHAPES = [(128, 96, 64), (1, 512, 512), (257, 33, 129), (64, 2048, 8)]


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """oneDNN on, whatever the processor is; afterwards as it was."""
    before = cpu_matmul.is_installed()
    monkeypatch.setattr(cpu_matmul, "pays_here", lambda: True)
    assert cpu_matmul.install()
    yield
    if not before:
        cpu_matmul.uninstall()


def operators_of(function: object, *args: object) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)  # type: ignore[operator]
    return {event.name for event in profile.events()}


def assert_product(actual: Tensor, left: Tensor, right: Tensor, before: Tensor | None = None) -> None:
    """Within the bound of an fp32 sum in any order: K * eps * |left| |right| (Higham, section 3.5)."""
    exact = left.double() @ right.double() + (0 if before is None else before.double())
    bound = left.shape[1] * 2**-23 * (left.double().abs() @ right.double().abs()) + exact.abs() * 2**-22
    assert bool(((actual.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["plain", "left transposed", "right transposed", "strided"])
def test_products_are_right_in_every_layout(shape: tuple[int, int, int], layout: str, onednn: None) -> None:
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    if layout == "left transposed":
        left = torch.randn(inner, rows).t()
    elif layout == "right transposed":
        right = torch.randn(columns, inner).t()
    elif layout == "strided":
        left, right = torch.randn(rows, 2 * inner)[:, ::2], torch.randn(inner, columns + 3)[:, 1:-2]
    assert "mkldnn::_linear_pointwise" in operators_of(torch.mm, left, right)
    product = left @ right
    assert product.is_contiguous()
    assert_product(product, left, right)
    out = torch.empty(columns, rows).t()
    assert torch.mm(left, right, out=out) is out
    assert_product(out, left, right)
    into = torch.randn(rows, columns)
    before = into.clone()
    assert into.addmm_(left, right) is into
    assert_product(into, left, right, before)
    assert_product(before.clone().addmm_(left, right, alpha=-2.0), left, -2.0 * right, before)
    assert_product(before.clone().addmm_(left, right, beta=0.5), left, right, 0.5 * before)


def test_gradients_of_linear_layers_and_of_grouped_products(onednn: None) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 50, 64, requires_grad=True), torch.randn(96, 64, requires_grad=True)
    stack, ends = torch.randn(3, 64, 96, requires_grad=True), torch.tensor([90, 90, 200], dtype=torch.int32)

    def outcome(*tensors: Tensor) -> list[Tensor]:
        x, weight, stack = tensors
        rows = x.reshape(200, 64)
        grouped = torch.cat([part @ each for part, each in zip(rows.split([90, 0, 110]), stack, strict=True)])
        if x.dtype is torch.float32:
            grouped = F.grouped_mm(rows, stack, offs=ends)
        output = F.linear(x, weight).reshape(200, 96) + grouped
        return [output, *torch.autograd.grad(output.square().sum(), tensors)]

    exact = outcome(*(tensor.detach().double().requires_grad_() for tensor in (x, weight, stack)))
    for actual, expected in zip(outcome(x, weight, stack), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-3)


def test_what_is_small_or_not_fp32_stays_with_torch(onednn: None) -> None:
    for dtype, size in ((torch.float32, 32), (torch.float64, 96)):
        left, right = torch.randn(2, size, size, dtype=dtype)
        assert "mkldnn::_linear_pointwise" not in operators_of(torch.mm, left, right)
        into = torch.zeros(size, size, dtype=dtype)
        torch.mm(left, right, out=into)
        torch.testing.assert_close(into, left @ right, rtol=0, atol=0)


def test_wrong_shapes_are_torchs_own_error(onednn: None) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.mm(torch.randn(300, 300), torch.randn(200, 300))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.zeros(300, 300).addmm_(torch.randn(300, 300), torch.randn(200, 300))


def test_onednn_is_let_keep_more_shapes_unless_the_user_has_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "pays_here", lambda: False)
    monkeypatch.setenv(cpu_matmul.CACHE_FLAG, "7")
    cpu_matmul.install()
    assert os.environ[cpu_matmul.CACHE_FLAG] == "7"
    monkeypatch.delenv(cpu_matmul.CACHE_FLAG)
    cpu_matmul.install()
    assert os.environ[cpu_matmul.CACHE_FLAG] == str(cpu_matmul.CACHE_ENTRIES)


def test_torchs_kernels_come_back(onednn: None) -> None:
    left, right = torch.randn(2, 200, 200)
    ours = left @ right
    cpu_matmul.uninstall()
    assert not cpu_matmul.is_installed()
    assert "mkldnn::_linear_pointwise" not in operators_of(torch.mm, left, right)
    torch.testing.assert_close(left @ right, ours)
    cpu_matmul.install()


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
    ],
)
def test_only_where_mkl_leaves_avx512_unused(
    vendor: str, capability: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_matmul, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert cpu_matmul.pays_here.__wrapped__() == (expected and torch.backends.mkldnn.is_available())
