"""Random numbers that belong to a token, a step and a layer: the same on every rank, layout and recompute.

A generator's next number depends on what was drawn before and on which rank; these depend on their keys alone, mixed
by splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).

Shape legend: N = tokens, E = experts.
"""

import torch
from torch import Tensor

from megatron_moe.moe.inputs import RoutingInputs

_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
_MIX_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
_MIX_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch shifts the sign in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def hashed(*keys: int | Tensor) -> Tensor:
    """64 random bits (int64) of every combination of keys; integers and int64 tensors, which broadcast."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        part = key if isinstance(key, Tensor) else torch.tensor(key, dtype=torch.int64)
        state = _mix(state.to(part.device) ^ part)
    return state


def uniform(*keys: int | Tensor) -> Tensor:
    """Float64 in (0, 1) of every combination of keys."""
    return (_shift_right(hashed(*keys), 11).double() + 0.5) / (1 << 53)


def token_uniform(inputs: RoutingInputs, *keys: int | Tensor) -> Tensor:
    """Float64 [N] in (0, 1) of the tokens; `keys` as (seed, purpose, step, layer)."""
    return uniform(*keys, inputs.sample, inputs.place)


def token_expert_uniform(inputs: RoutingInputs, experts: int, *keys: int | Tensor) -> Tensor:
    """Float64 [N, E] in (0, 1) of every token and expert."""
    expert_E = torch.arange(experts, device=inputs.token.device)
    return uniform(*keys, inputs.sample[:, None], inputs.place[:, None], expert_E)


def token_channel_uniform(inputs: RoutingInputs, channels: int, *keys: int | Tensor) -> Tensor:
    """Float32 [N, channels] in [0, 1) of every token and channel.

    A channel's number is mixed with 32 bits of its token by murmur3's finalizer: H numbers a token must be cheap.
    """
    token_N = hashed(*keys, inputs.sample, inputs.place).to(torch.int32)
    channel_H = hashed(torch.arange(channels, device=inputs.token.device)).to(torch.int32)
    bits_NH = token_N[:, None] ^ channel_H
    bits_NH ^= (bits_NH >> 16) & 0xFFFF
    bits_NH *= -0x7A143595  # 0x85EBCA6B
    bits_NH ^= (bits_NH >> 13) & 0x7FFFF
    bits_NH *= -0x3D4D51CB  # 0xC2B2AE35
    bits_NH ^= (bits_NH >> 16) & 0xFFFF
    return ((bits_NH >> 8) & 0xFFFFFF).float().mul_(2.0**-24)
