"""Large margins on a router's logits: pure functions of tensors.

A linear router's logit is a length times a cosine, z_e = w_e . x = |w_e| |x| cos(w_e, x). A margin makes a token earn
its place at a target expert t by more than the others' logits: training lowers z_t, so that x and w_t move together.

Sources: L-Softmax (Liu et al., Large-Margin Softmax Loss for Convolutional Neural Networks, 2016), which Alibaba PAI's
released GPT-MoE uses in its router; AM-Softmax (Wang et al., Additive Margin Softmax for Face Verification, 2018);
Elsayed et al., Large Margin Deep Networks for Classification, 2018, the paper that PAI cites.

Shape legend: N = tokens, E = experts, H = hidden size, B = sequences, S = their tokens on this rank.
"""

import math

import torch
from torch import Tensor

EPSILON = 1e-10
"""Keeps the division by a length of zero finite."""


def psi(cos_N: Tensor, margin: int) -> Tensor:
    """L-Softmax's psi(theta) = (-1)^k cos(m theta) - 2 k, with k = floor(m theta / pi): falls from 1 to 1 - 2 m.

    It is cos(theta) for m = 1, and below it for m > 1. cos(m theta) is the Chebyshev polynomial sum over n of
    (-1)^n C(m, 2n) c^(m - 2n) (1 - c^2)^n of c = cos(theta), and k counts the multiples of pi / m that theta has
    reached by their cosines: without acos, whose slope at |c| = 1 is infinite, the gradient is finite everywhere.
    """
    polynomial_N = torch.zeros_like(cos_N)
    for n in range(margin // 2 + 1):
        factor = (-1) ** n * math.comb(margin, 2 * n)
        polynomial_N = polynomial_N + factor * cos_N ** (margin - 2 * n) * (1.0 - cos_N * cos_N) ** n
    bounds = [math.cos(j * math.pi / margin) for j in range(1, margin)]
    reached_N = torch.stack([cos_N.detach() <= bound for bound in bounds]).sum(dim=0) if bounds else 0
    sign_N = 1 - 2 * (reached_N % 2)
    return sign_N * polynomial_N - 2 * reached_N


def lsoftmax(z_N: Tensor, length_N: Tensor, margin: int, beta: Tensor | float) -> Tensor:
    """z' = (length psi(cos) + beta z) / (1 + beta) of the target's logits, as z plus what the margin takes away.

    Args:
        z_N: logits of the targets.
        length_N: |w_t| |x|.
        margin: m.
        beta: weight of the plain logit, annealed from large (no margin) to small.
    """
    cos_N = z_N / (length_N + EPSILON)
    return z_N + length_N * (psi(cos_N, margin) - cos_N) / (1.0 + beta)


def additive(z_N: Tensor, length_N: Tensor | float, margin: float) -> Tensor:
    """z' = length (cos - m) of the target's logits."""
    return z_N - margin * length_N


def beta_at(step: int, start: float, decay: float, minimum: float) -> float:
    """beta(step) = max(minimum, start * decay^step): a function of the step alone."""
    return max(minimum, start * decay**step)


def boundary_loss(z_NE: Tensor, weight_EH: Tensor, target_N: Tensor, margin: float) -> Tensor:
    """Elsayed et al.'s loss of every token [N]: max over j != i of relu(gamma - d_ij), i being the target.

    d_ij = (z_i - z_j) / |w_i - w_j| is the distance of x to the boundary between i and j: exact for a linear router,
    whose gradient with respect to x is w. As in the paper no gradient flows into the denominator.

    Args:
        z_NE: logits.
        weight_EH: the router's.
        target_N: i.
        margin: gamma, a distance in the space of x.
    """
    weight_EH = weight_EH.detach().to(z_NE.dtype)
    apart_EE = torch.linalg.vector_norm(weight_EH[:, None] - weight_EH, dim=-1) + EPSILON
    distance_NE = (z_NE.gather(1, target_N[:, None]) - z_NE) / apart_EE[target_N]
    itself_NE = torch.nn.functional.one_hot(target_N, z_NE.shape[1]).bool()
    return torch.relu(margin - distance_NE.masked_fill(itself_NE, math.inf).min(dim=1).values)


def round_robin(sample_SB: Tensor, place_SB: Tensor, experts: int, ranks: int) -> Tensor:
    """Targets [N]: the number of a token in its micro-batch, modulo E (PAI's released code).

    Sequences count in the order of the data and tokens by place, so that the number is the same on whichever of the
    `ranks` that share the micro-batch's sequences a token lies.
    """
    length = sample_SB.shape[0] * ranks
    order_B = torch.argsort(torch.argsort(sample_SB[0], stable=True), stable=True)
    return ((order_B * length + place_SB) % experts).view(-1)
