"""What a router knows of its tokens beside their hidden states: ids, places, samples and domains.

They travel as one integer tensor from the data to every layer, through the argument that megatron-core passes to MoE
layers for padding masks (`GPTModel.forward(padding_mask=)`): so pipeline stages read them from their own data, and
activation recompute keeps them with the micro-batch they belong to.

Shape legend: B = sequences, S = their tokens (on this rank), K = channels, N = S * B tokens in the order in which a
layer flattens [S, B, H].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHANNELS = ("token", "place", "sample", "domain")


@dataclass(frozen=True)
class RoutingInputs:
    """Integers about N tokens, each [N]."""

    token: Tensor
    """Token ids."""
    place: Tensor
    """Where a token stands in its sequence, from 0, whichever rank holds it."""
    sample: Tensor
    """Number of the sequence in the order of the data: with `place` it names a token under every layout."""
    domain: Tensor
    """Domain of the token's document; 0 where there are no domains."""


def pack_inputs(
    tokens_BS: Tensor, samples_B: Tensor, *, domains_BS: Tensor | None = None, first_place: int = 0
) -> Tensor:
    """One tensor [B, S, K] of whole sequences, before any rank takes its part.

    Args:
        tokens_BS: token ids.
        samples_B: numbers of the sequences.
        domains_BS: domains. Default: 0.
        first_place: place of the first token: how many a cache holds already.
    """
    batch, length = tokens_BS.shape
    places_S = torch.arange(first_place, first_place + length, device=tokens_BS.device)
    channels = (
        tokens_BS,
        places_S.expand(batch, length),
        samples_B[:, None].expand(batch, length),
        torch.zeros_like(tokens_BS) if domains_BS is None else domains_BS,
    )
    return torch.stack([channel.long() for channel in channels], dim=-1)


def unpack_inputs(packed_BSK: Tensor) -> RoutingInputs:
    """The tokens of [B, S, K] in a layer's order."""
    return RoutingInputs(*packed_BSK.transpose(0, 1).reshape(-1, len(CHANNELS)).unbind(dim=-1))
