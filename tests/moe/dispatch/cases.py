"""A routed layer of plain tensors: every expert on every token of all ranks, and the same through a dispatcher.

Every rank can compute every rank's tokens, weights and map from their seeds, so that the naive form needs no exchange.
An expert is W2 gelu(W1 x), times the token's weight for it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.tiny import tiny_run

H, WIDTH, TOKENS = 16, 8, 12


@dataclass(frozen=True)
class Case:
    """One layer on the first `ep` x `etp` ranks, and on all other such blocks of ranks."""

    ep: int
    experts: int
    etp: int = 1
    node: int = 8
    topk: int = 2
    routing: str = "random"
    dtype: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32

    @property
    def block(self) -> int:
        """Ranks that exchange tokens."""
        return self.ep * self.etp


def make_map(case: Case, rank: int) -> Tensor:
    """[tokens, experts] bool. Only `drops`, `padded` and `choice` have other than top-k experts a token."""
    generator = torch.Generator().manual_seed(100 + rank)
    tokens, experts = TOKENS, case.experts
    scores = torch.rand(tokens, experts, generator=generator)
    if case.routing == "skewed":
        scores[:, : case.topk] += torch.tensor([2.0] * case.topk)
    if case.routing == "empty":
        # Nobody goes to the second half: half of the ranks get nothing.
        scores[:, max(experts // 2, case.topk) :] -= 2.0
    if case.routing == "spread":
        # One expert of the first rank, one of the last.
        scores[:, [0, -1]] += 2.0
    map_NE = torch.zeros(tokens, experts, dtype=torch.bool)
    map_NE.scatter_(1, scores.topk(case.topk, dim=1).indices, True)
    if case.routing == "drops":
        map_NE &= torch.rand(tokens, experts, generator=generator) > 0.4
        map_NE[:3] = False
        if rank == 1:
            map_NE[:] = False
    if case.routing == "padded":
        # Every expert gets exactly its capacity.
        map_NE = scores.argsort(dim=0).argsort(dim=0) < -(-tokens * case.topk // experts)
    if case.routing == "choice":
        map_NE = torch.rand(tokens, experts, generator=generator) < case.topk / experts
    return map_NE


def make_inputs(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [tokens, 1, H], weights [tokens, experts], zero where there is no route, and what the output is
    multiplied with for a loss."""
    generator = torch.Generator().manual_seed(200 + rank)
    x, probe = (torch.randn(TOKENS, 1, H, generator=generator).to(case.dtype) for _ in range(2))
    weights = torch.rand(TOKENS, case.experts, generator=generator) * make_map(case, rank)
    return x, weights.to(case.weights), probe


def make_experts(case: Case) -> tuple[Tensor, Tensor]:
    """W1 [E, WIDTH, H] and W2 [E, H, WIDTH] of all experts."""
    generator = torch.Generator().manual_seed(300)
    w1 = torch.randn(case.experts, WIDTH, H, generator=generator) / 4
    w2 = torch.randn(case.experts, H, WIDTH, generator=generator)
    return w1.to(case.dtype), w2.to(case.dtype)


def expert(x: Tensor, w1: Tensor, w2: Tensor, weight: Tensor) -> Tensor:
    return (F.gelu(x @ w1.t()) * weight.unsqueeze(1).to(x.dtype)) @ w2.t()


def naive(case: Case, rank: int) -> list[Tensor]:
    """Every expert applied to every token of this rank's block, in fp64: output and gradients of this rank's tokens and
    weights, and gradients of the matrices of all experts."""
    first = rank - rank % case.block
    w1, w2 = (tensor.double().requires_grad_() for tensor in make_experts(case))
    parts = [make_inputs(case, other) for other in range(first, first + case.block)]
    x, weights, probe = (torch.cat([part[i] for part in parts]).double() for i in range(3))
    routed = torch.cat([make_map(case, other) for other in range(first, first + case.block)])
    x, weights = x[:, 0].requires_grad_(), weights.requires_grad_()
    used = weights * routed
    out = torch.stack([expert(x, w1[e], w2[e], used[:, e]) for e in range(case.experts)]).sum(dim=0)
    gradients = torch.autograd.grad((out * probe[:, 0]).sum(), [x, weights, w1, w2])
    mine = slice((rank - first) * TOKENS, (rank - first + 1) * TOKENS)
    return [out.detach()[mine], gradients[0][mine, None], gradients[1][mine], *gradients[2:]]


def sum_of_terms(case: Case, rank: int) -> Tensor:
    """For each element of the output the sum of the absolute values of what its experts add."""
    w1, w2 = (tensor.double() for tensor in make_experts(case))
    x, weights, _ = (tensor.double() for tensor in make_inputs(case, rank))
    used = weights * make_map(case, rank)
    return torch.stack([expert(x[:, 0], w1[e], w2[e], used[:, e]).abs() for e in range(case.experts)]).sum(dim=0)


Groups = dict[tuple[str, int, int], dist.ProcessGroup]


def make_groups(cases: list[Case]) -> Groups:
    """The groups that megatron-core would make for each size, on all ranks together."""
    groups: Groups = {}
    world, rank = dist.get_world_size(), dist.get_rank()
    for ep, etp in sorted({(case.ep, case.etp) for case in cases}):
        for first in range(0, world, ep * etp):
            block = list(range(first, first + ep * etp))
            parts = {"tp_ep": [block]}
            parts["ep"] = [block[place::etp] for place in range(etp)]
            parts["expt_tp"] = [block[start : start + etp] for start in range(0, len(block), etp)]
            for name, lists in parts.items():
                for members in lists:
                    group = dist.new_group(members)
                    if rank in members:
                        groups[name, ep, etp] = group
    return groups


def make_config(case: Case, kind: str) -> Any:
    from megatron_moe.model.transformer_config import build_transformer_config

    run = tiny_run(vocab_size=100)
    config = copy.copy(build_transformer_config(run))
    config.num_moe_experts = case.experts
    config.moe_router_topk = case.topk
    config.ranks_per_node = case.node
    config.moe_expert_capacity_factor = 1.0 if case.routing in ("drops", "choice", "padded") else None
    config.moe_pad_expert_input_to_capacity = case.routing == "padded"
    config.moe = copy.copy(run.moe)
    object.__setattr__(config.moe, "moe_token_dispatcher_type", kind)
    return config


def make_dispatcher(case: Case, groups: Groups, kind: str) -> Any:
    """`stock`, or one of ours."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    from megatron_moe.moe.dispatch.choose import replace_dispatcher

    config = make_config(case, "alltoall" if kind == "stock" else kind)
    collection: Any = SimpleNamespace(**{name: groups[name, case.ep, case.etp] for name in ("ep", "expt_tp", "tp_ep")})
    local = case.experts // case.ep
    first = collection.ep.rank() * local
    stock = MoEAlltoAllTokenDispatcher(local, list(range(first, first + local)), config, collection)
    return stock if kind == "stock" else replace_dispatcher(stock, config, collection)


def through(case: Case, dispatcher: Any, wrap: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Output, gradients of tokens and weights, and of this rank's part of the matrices of its experts."""
    rank = dist.get_rank()
    local = case.experts // case.ep
    first, slice_of_width = dispatcher.ep_rank * local, WIDTH // case.etp
    start = dispatcher.tp_rank * slice_of_width
    w1, w2 = make_experts(case)
    w1 = w1[first : first + local, start : start + slice_of_width].clone().requires_grad_()
    w2 = w2[first : first + local, :, start : start + slice_of_width].clone().requires_grad_()
    x, weights, probe = make_inputs(case, rank)
    x.requires_grad_()
    weights.requires_grad_()

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        rows, probs = dispatcher.dispatch_preprocess(x, make_map(case, rank), weights)
        rows, probs = dispatcher.token_dispatch(rows, probs)
        rows, counts, probs = dispatcher.dispatch_postprocess(rows, probs)
        parts = zip(rows.split(counts.tolist()), probs.split(counts.tolist()), w1, w2, strict=True)
        out = torch.cat([expert(*(part[0], part[2], part[3], part[1])) for part in parts])
        out = dispatcher.token_combine(dispatcher.combine_preprocess(out))
        result: Tensor = dispatcher.combine_postprocess(out)
        return result

    out = layer(x, weights) if wrap is None else wrap(layer, x, weights)
    gradients = torch.autograd.grad((out * probe).sum(), [x, weights, w1, w2])
    return [out.detach()[:, 0], *gradients]


def slice_of(case: Case, dispatcher: Any, reference: list[Tensor]) -> list[Tensor]:
    """Of the naive gradients, those that this rank has."""
    local = case.experts // case.ep
    first, width = dispatcher.ep_rank * local, WIDTH // case.etp
    start = dispatcher.tp_rank * width
    out, x, weights, w1, w2 = reference
    return [
        out,
        x,
        weights,
        w1[first : first + local, start : start + width],
        w2[first : first + local, :, start : start + width],
    ]
