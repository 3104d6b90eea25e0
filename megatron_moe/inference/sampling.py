"""Chooses the next token from logits: greedy, or at random with temperature, top-k and top-p.

The randomness comes in as one uniform number per row, drawn from a generator of that row's own. A sample therefore
depends on the seed and on its prompt alone: not on its batch mates, the batch size or the parallel layout.

Shape legend: B = rows, V = vocabulary.
"""

import hashlib

import torch
from torch import Tensor

from megatron_moe.inference.options import SamplingOptions


def choose_tokens(logits_BV: Tensor, options: SamplingOptions, uniforms_B: Tensor | None = None) -> Tensor:
    """Next tokens.

    Args:
        logits_BV: [B, V] of the tokens that may be chosen.
        options: how.
        uniforms_B: [B] in [0, 1), float64; not needed for a greedy choice.

    Returns:
        [B] ids, int64.
    """
    if options.is_greedy:
        return logits_BV.argmax(dim=-1)
    assert uniforms_B is not None
    probs_BV = torch.softmax(logits_BV.double() / options.divisor, dim=-1)
    cdf_BV = keep_likely(probs_BV, options.top_k, options.top_p).cumsum(dim=-1)
    # In the order of ids, not of probabilities: rounding that swaps two nearly equal tokens changes nothing.
    thresholds_B1 = (uniforms_B * cdf_BV[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cdf_BV, thresholds_B1, right=True).squeeze(-1).clamp(max=cdf_BV.shape[-1] - 1)


def keep_likely(probs_BV: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Probabilities [B, V] with the tokens that top-k and top-p rule out at 0; not normalised again.

    top-p applies to what top-k leaves, and keeps the token that reaches the limit. The most probable token always
    stays.
    """
    if top_k is None and top_p is None:
        return probs_BV
    sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        sorted_BV[:, top_k:] = 0.0
    if top_p is not None:
        before_BV = sorted_BV.cumsum(dim=-1) - sorted_BV
        limit_B1 = top_p * sorted_BV.sum(dim=-1, keepdim=True)
        sorted_BV = sorted_BV.where((before_BV < limit_B1) | (before_BV == 0.0), 0.0)
    return torch.zeros_like(probs_BV).scatter(-1, order_BV, sorted_BV)


def row_generator(seed: int, prompt: int, sample: int) -> torch.Generator:
    """Generator of one continuation.

    Args:
        seed: `--seed`.
        prompt: number of the prompt in the input.
        sample: number of the continuation of that prompt.
    """
    digest = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def draw(generator: torch.Generator) -> float:
    """A uniform number in [0, 1)."""
    return float(torch.rand((), generator=generator, dtype=torch.float64))
