"""A dense GPT written out in plain torch, head by head, on the parameters of a model that megatron-core built.

The oracle for what layers share: `computes` says which layers work out attention weights, `sources` whose keys and
values a layer uses.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.run import RunConfig


def plain_losses(
    chunk: torch.nn.Module,
    run: RunConfig,
    ids_BS: Tensor,
    labels_BS: Tensor,
    *,
    computes: Sequence[bool] | None = None,
    sources: Sequence[int] | None = None,
) -> Tensor:
    """[B, S] negative log-probabilities of the labels.

    Args:
        chunk: the model, whole and on this process.
        run: its flags.
        ids_BS, labels_BS: tokens, and those that follow.
        computes: for each layer. Default: all do.
        sources: for each layer, counted from 0. Default: its own.
    """
    model, parameters = run.model, dict(chunk.named_parameters())
    x_BSM = parameters["embedding.word_embeddings.weight"][ids_BS]
    if model.position_embedding_type == "learned_absolute":
        x_BSM = x_BSM + parameters["embedding.position_embeddings.weight"][: ids_BS.shape[1]]
    shared: dict[int, tuple[Tensor, Tensor]] = {}
    weights: list[Tensor] = []
    for number in range(model.num_layers):
        part = {
            name.removeprefix(f"decoder.layers.{number}."): value
            for name, value in parameters.items()
            if name.startswith(f"decoder.layers.{number}.")
        }
        y_BSM = _norm(run, part, "input_layernorm", x_BSM)
        query, own = _project(run, part, y_BSM)
        if own is not None:
            shared[number] = own
        key, value = shared[number if sources is None else sources[number]]
        if computes is None or computes[number]:
            weights = _weights(run, part, query, key)
        ratio = model.num_attention_heads // model.query_groups
        heads = [weight @ value[:, :, head // ratio] for head, weight in enumerate(weights)]
        x_BSM = x_BSM + _linear(part, "self_attention.linear_proj", torch.cat(heads, dim=-1))
        y_BSM = _norm(run, part, "pre_mlp_layernorm", x_BSM)
        y_BSM = _linear(part, "mlp.linear_fc2", F.gelu(_linear(part, "mlp.linear_fc1", y_BSM)))
        x_BSM = x_BSM + y_BSM
    x_BSM = _norm(run, parameters, "decoder.final_layernorm", x_BSM)
    logits = x_BSM @ parameters["embedding.word_embeddings.weight"].t()
    return F.cross_entropy(logits.flatten(0, 1), labels_BS.flatten(), reduction="none").view_as(labels_BS)


def _linear(part: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, part[f"{name}.weight"], part.get(f"{name}.bias"))


def _norm(run: RunConfig, part: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, eps = part[f"{name}.weight"], run.model.norm_epsilon
    if run.model.normalization == "RMSNorm":
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + part[f"{name}.bias"]


def _project(run: RunConfig, part: dict[str, Tensor], x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Query [B, S, H, D]; key and value [B, S, G, D] if the layer has any: all without norm and rotation."""
    model, width = run.model, run.model.head_dim
    if "self_attention.linear_q.weight" in part:
        return _linear(part, "self_attention.linear_q", x).unflatten(-1, (-1, width)), None
    mixed = _linear(part, "self_attention.linear_qkv", x).unflatten(-1, (model.query_groups, -1, width))
    return mixed[..., :-2, :].flatten(2, 3), (mixed[..., -2, :], mixed[..., -1, :])


def _weights(run: RunConfig, part: dict[str, Tensor], query: Tensor, key: Tensor) -> list[Tensor]:
    """A [B, S, S] of every head."""
    model = run.model
    if model.qk_layernorm:
        together = model.qk_layernorm_type == "projection"
        query, key = (
            _norm(run, part, f"self_attention.{name}", x.flatten(2)).view_as(x)
            if together
            else _norm(run, part, f"self_attention.{name}", x)
            for name, x in (("q_layernorm", query), ("k_layernorm", key))
        )
    if model.position_embedding_type == "rope":
        query, key = _rotate(query), _rotate(key)
    length = query.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    ratio, weights = model.num_attention_heads // model.query_groups, []
    for head in range(model.num_attention_heads):
        scores = query[:, :, head] @ key[:, :, head // ratio].transpose(1, 2) / math.sqrt(model.head_dim)
        weights.append(scores.masked_fill(future, float("-inf")).softmax(dim=-1))
    return weights


def _rotate(x: Tensor) -> Tensor:
    """Rotary embedding of [B, S, heads, D], base 10000, halves of a head paired."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def tokens(run: RunConfig, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and labels [B, S], and routing inputs of samples numbered from 10 * `seed`."""
    from megatron_moe.moe.inputs import pack_inputs

    assert run.model.vocab_size is not None
    rows, length = run.training.micro_batch_size, run.model.seq_length
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(run.model.vocab_size, (rows, length + 1), generator=generator)
    ids_BS = text[:, :-1].contiguous()
    return ids_BS, text[:, 1:].contiguous(), pack_inputs(ids_BS, torch.arange(rows) + 10 * seed)


def model_losses(chunk: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """[B, S] by the model itself."""
    ids_BS, labels_BS, inputs_BSK = batch
    positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
    return chunk(ids_BS, positions_BS, None, labels=labels_BS, padding_mask=inputs_BSK)


def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of any tensor, over its largest value; tensors a thousand times smaller than the largest count as that large."""
    floor = 1e-3 * max(float(tensor.abs().max()) for tensor in expected)
    return max(
        float((a - b).abs().max()) / max(floor, float(b.abs().max())) for a, b in zip(actual, expected, strict=True)
    )


def losses_and_gradients(chunk: torch.nn.Module, losses_BS: Tensor) -> list[Tensor]:
    """The losses, and the gradients of their mean by all parameters."""
    gradients = torch.autograd.grad(losses_BS.mean(), list(chunk.parameters()), materialize_grads=True)
    return [losses_BS.detach(), *gradients]
