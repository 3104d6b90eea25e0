"""Margins against their definitions: the angle itself, distances to real boundaries, one token at a time.

In fp64, so that tolerances are rounding (1e-12); what fp32 adds is tested with the router.
"""

import math

import pytest
import torch
from torch import Tensor

from megatron_moe.moe.margins import additive, beta_at, boundary_loss, lsoftmax, psi, round_robin

ANGLES = [math.pi * i / 240 for i in range(241)]


def psi_by_angle(theta: float, m: int) -> float:
    k = min(math.floor(m * theta / math.pi), m - 1)
    return (-1) ** k * math.cos(m * theta) - 2 * k


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_psi_is_its_definition(m: int) -> None:
    cos = torch.tensor([math.cos(theta) for theta in ANGLES], dtype=torch.float64)
    expected = torch.tensor([psi_by_angle(theta, m) for theta in ANGLES], dtype=torch.float64)
    got = psi(cos, m)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert (got <= cos + 1e-15).all()
    assert (got.diff() < 0).all(), "it falls with the angle, across every multiple of pi / m"
    assert got[0].item() == pytest.approx(1.0)
    assert got[-1].item() == pytest.approx(1.0 - 2.0 * m)
    if m == 1:
        assert torch.equal(got, cos)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_slope_of_psi_is_finite_where_acos_has_none(m: int) -> None:
    """dpsi / dcos = (-1)^k m sin(m theta) / sin(theta), whose limits at 0 and pi are m^2."""
    cos = torch.tensor([1.0, -1.0, 1.0 + 1e-7, -1.0 - 1e-7, 0.3, -0.8], dtype=torch.float32, requires_grad=True)
    (slope,) = torch.autograd.grad(psi(cos, m).sum(), cos)
    assert slope.isfinite().all()
    torch.testing.assert_close(slope[:4], torch.full((4,), float(m * m)), rtol=1e-4, atol=0)
    for value, got in zip((0.3, -0.8), slope[4:], strict=True):
        theta = math.acos(value)
        k = math.floor(m * theta / math.pi)
        assert got.item() == pytest.approx((-1) ** k * m * math.sin(m * theta) / math.sin(theta), rel=1e-4)


def tokens_and_weights() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    w = torch.randn(5, 6, dtype=torch.float64, generator=generator)
    return x, w, torch.randint(0, 5, (40,), generator=generator)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("beta", [0.0, 0.7, 100.0])
def test_lsoftmax_is_its_formula(m: int, beta: float) -> None:
    x, w, target = tokens_and_weights()
    z = (x @ w.T).gather(1, target[:, None])[:, 0]
    length = x.norm(dim=1) * w.norm(dim=1)[target]
    got = lsoftmax(z, length, m, beta)
    for n in range(len(x)):
        a, b = x[n], w[target[n]]
        theta = math.acos(float(a @ b) / float(a.norm() * b.norm()))
        plain = float(a @ b)
        expected = (float(a.norm() * b.norm()) * psi_by_angle(theta, m) + beta * plain) / (1 + beta)
        assert got[n].item() == pytest.approx(expected, abs=1e-9)
    assert (got <= z + 1e-12).all()
    if m == 1:
        assert torch.equal(got, z)


@pytest.mark.parametrize("m", [2, 3, 4])
def test_gradients_of_lsoftmax_reach_token_and_expert(m: int) -> None:
    x, w, target = (part.clone() for part in tokens_and_weights())

    def margined(x: Tensor, w: Tensor) -> Tensor:
        z = (x @ w.T).gather(1, target[:, None])[:, 0]
        return lsoftmax(z, x.norm(dim=1) * w.norm(dim=1)[target], m, 0.5)

    assert torch.autograd.gradcheck(margined, (x.requires_grad_(), w.requires_grad_()))


def test_a_token_of_zeros_has_finite_gradients() -> None:
    x = torch.zeros(1, 6, requires_grad=True)
    w = torch.randn(1, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    z = (x @ w.T)[:, 0]
    lsoftmax(z, torch.linalg.vector_norm(x, dim=1) * torch.linalg.vector_norm(w, dim=1), 2, 0.0).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert w.grad is not None
    assert w.grad.isfinite().all()


def test_margin_moves_a_fresh_router_by_its_length() -> None:
    """Cosines near 0, m = 2, 3, 4: psi(90 degrees) = -1, -2, -3 lengths."""
    zero = torch.zeros(1, dtype=torch.float64)
    for m, moved in ((2, -1.0), (3, -2.0), (4, -3.0)):
        assert lsoftmax(zero, torch.full((1,), 5.1, dtype=torch.float64), m, 0.0).item() == pytest.approx(5.1 * moved)


def test_additive_is_its_formula() -> None:
    x, w, target = tokens_and_weights()
    z, length = (x * w[target]).sum(dim=1), x.norm(dim=1) * w[target].norm(dim=1)
    torch.testing.assert_close(additive(z, length, 0.2), length * (z / length - 0.2))
    torch.testing.assert_close(additive(4.0 * z / length, 4.0, 0.2), 4.0 * (z / length - 0.2))
    assert torch.equal(additive(z, length, 0.0), z)


def test_beta_falls_to_its_minimum_and_depends_on_the_step_alone() -> None:
    by_hand = 100.0
    for step in range(300):
        assert beta_at(step, 100.0, 0.99, 0.0) == pytest.approx(by_hand, rel=1e-12)
        by_hand *= 0.99
    assert beta_at(0, 100.0, 0.99, 5.0) == 100.0
    assert beta_at(10_000, 100.0, 0.99, 5.0) == 5.0


@pytest.mark.parametrize("winner", [True, False])
def test_boundary_loss_is_its_formula(winner: bool) -> None:
    x, w, target = tokens_and_weights()
    z = x @ w.T
    target = z.argmax(dim=1) if winner else target
    got = boundary_loss(z, w, target, 1.0)
    for n in range(len(x)):
        i = int(target[n])
        shortfalls = [
            max(0.0, 1.0 - float(z[n, i] - z[n, j]) / float((w[i] - w[j]).norm())) for j in range(5) if j != i
        ]
        assert got[n].item() == pytest.approx(max(shortfalls), abs=1e-9)
    assert (got > 0).any()
    assert not winner or (got == 0).any(), "some winners are far from every boundary"


def test_distance_is_that_of_a_real_boundary() -> None:
    """Moved by d along -(w_i - w_j) / |w_i - w_j|, a token stands between i and j."""
    x, w, _ = tokens_and_weights()
    z = x @ w.T
    i = z.argmax(dim=1)
    loss = boundary_loss(z, w, i, 100.0)
    for n in range(len(x)):
        distance = 100.0 - loss[n]
        margins = []
        for j in range(5):
            if j != i[n]:
                direction = (w[i[n]] - w[j]) / (w[i[n]] - w[j]).norm()
                moved = w @ (x[n] - distance * direction)
                margins.append(float(moved[i[n]] - moved[j]))
        assert min(margins) == pytest.approx(0.0, abs=1e-9)


def test_no_gradient_flows_into_the_denominator() -> None:
    x, w, target = tokens_and_weights()
    w.requires_grad_()
    loss = boundary_loss(x @ w.T, w, target, 5.0)
    (got,) = torch.autograd.grad(loss.sum(), w)
    expected = torch.zeros_like(w)
    for n in range(len(x)):
        i = int(target[n])
        others = [j for j in range(5) if j != i]
        worst = min(others, key=lambda j: float((x[n] @ (w[i] - w[j]) / (w[i] - w[j]).norm()).detach()))
        if loss[n] > 0:
            apart = (w[i] - w[worst]).norm().detach()
            expected[i] -= x[n] / apart
            expected[worst] += x[n] / apart
    torch.testing.assert_close(got, expected)


def test_round_robin_numbers_tokens_in_one_order() -> None:
    """12 places, samples 9 and 4 in one micro-batch, 5 experts; whole, and cut into two ranks' parts."""
    sample_SB = torch.tensor([9, 4]).expand(12, 2)
    place_SB = torch.arange(12)[:, None].expand(12, 2)
    whole = round_robin(sample_SB, place_SB, 5, 1).view(12, 2)
    for place in range(12):
        assert whole[place].tolist() == [(12 + place) % 5, place % 5]
    assert whole.flatten().bincount().tolist() == [5, 5, 5, 5, 4]
    # Context parallelism gives a rank the first and the last quarter.
    for rows in ([0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]):
        part = round_robin(sample_SB[rows], place_SB[rows], 5, 2).view(6, 2)
        assert torch.equal(part, whole[rows])
