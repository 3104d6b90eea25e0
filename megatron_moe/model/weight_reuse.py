"""Attention weights reused from the layer before (HunYuan 1T's "attention weight copy").

In training layer l computes A_l = softmax(Q_l K_l^T / sqrt(d)) with probability p, otherwise A_l = A_{l-1}, which may
be a copy itself; its output is always A_l V_l W_O, with its own values. Gradients flow into the layer that computed. A
copying layer computes neither queries nor keys. Layers whose weights nobody copies, evaluation and inference run the
fused kernel, as without reuse. The drop mask of attention dropout is drawn anew in every layer.

Each layer and micro-batch has one draw, hashed from the seed, the step, the layer and the micro-batch's first sample:
every rank that works on a micro-batch, and every recomputation of it, comes to the same.

Shape legend: S = queries on this rank, T = keys, B = batch, H = heads on this rank, G = key/value heads on this rank,
R = H / G, D = head width, N = B * G, Q = R * S, K = channels of `moe/inputs.py`.
"""

import hashlib
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_moe.model.attention import gather_sequence
from megatron_moe.model.layer import CarryingLayer
from megatron_moe.moe.inputs import CHANNELS

SAMPLE = CHANNELS.index("sample")

type Role = Literal["plain", "source", "copy"]


def computes_weights(layer: int, *, seed: int, step: int, sample: int, prob: float, span: int) -> bool:
    """Whether a layer computes its attention weights for a micro-batch.

    Args:
        layer: counted from 1 over the whole model.
        seed, step: of the run.
        sample: number of the micro-batch's first sequence.
        prob: `--attention-weight-reuse-prob`.
        span: layers 1, span+1, 2*span+1, ... always compute.
    """
    if (layer - 1) % span == 0:
        return True
    digest = hashlib.sha256(f"{seed}/attention weights/{step}/{layer}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64 < prob


class ReusingLayer(CarryingLayer):
    """Draws what its attention does: compute as ever, compute and hand on, or copy.

    Attributes:
        step: of the run, counted from 0; `begin_step` sets it.
    """

    step: int = 0

    def begin_step(self, step: int) -> None:
        """A training step begins; the same number on every rank."""
        self.step = step

    def finish_step(self, group: dist.ProcessGroup, *, skipped: bool) -> None:
        """A training step is over: nothing to do."""

    def forward(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Upstream's layer.

        Args:
            args, kwargs: of `TransformerLayer.forward`.
            padding_mask: the routing inputs [B, S, K]; needed in training.
        """
        self.self_attention.role = self._role(padding_mask) if self.training else "plain"
        return super().forward(*args, padding_mask=padding_mask, **kwargs)

    def _role(self, inputs_BSK: Tensor | None) -> Role:
        if inputs_BSK is None:
            raise ValueError("attention weights are reused by micro-batch: the model needs the routing inputs")
        # A copy to the host, as what follows depends on it.
        sample = int(inputs_BSK[0, 0, SAMPLE])
        if not self._computes(self.layer_number, sample):
            return "copy"
        last = self.layer_number == self.config.num_layers
        return "plain" if last or self._computes(self.layer_number + 1, sample) else "source"

    def _computes(self, layer: int, sample: int) -> bool:
        config = self.config
        return computes_weights(
            layer,
            seed=config.seed,
            step=self.step,
            sample=sample,
            prob=config.attention_weight_reuse_prob,
            span=config.attention_weight_reuse_span,
        )


class ReusingAttention(SelfAttention):
    """Self-attention that leaves its weights [B, H, S, T] in `carried`, or finds there those that it uses.

    With a role it does what upstream's `Attention.forward` does in training (transformer/attention.py: projections,
    rotation, core attention with or without recompute, output projection), for `SdpaAttention`'s scale and dropout.

    Attributes:
        role: of this layer for the micro-batch at hand; `ReusingLayer` sets it.
        carried: see `CarryingLayer`.
    """

    role: Role = "plain"
    carried: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        rotary_pos_emb: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Upstream's, or with explicit weights.

        Args:
            hidden_states: [S, B, hidden size].
            attention_mask: None; attention is causal.
            args, kwargs: of `Attention.forward`; without a role in training.
            rotary_pos_emb: of queries and keys.
        """
        if self.role == "plain":
            self.carried = None
            return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)
        if self.role == "copy":
            assert self.carried is not None, f"layer {self.layer_number} found no attention weights"
            value = self._value(hidden_states)
            out = self._run(self._apply_weights, self.carried, value)
        else:
            query, key, value = self.get_query_key_value_tensors(hidden_states)
            if rotary_pos_emb is not None:
                pair = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb,) * 2
                query, key = (
                    apply_rotary_pos_emb(part, emb, config=self.config, cp_group=self.pg_collection.cp)
                    for part, emb in zip((query, key), pair, strict=True)
                )
            out, self.carried = self._run(self._compute_and_apply, query, key, value)
        return self.linear_proj(out)

    def _run(self, function: Any, *tensors: Tensor | None) -> Any:
        """Call, under `--recompute-modules core_attn` so that only arguments and results are kept."""
        return (
            tensor_parallel.checkpoint(function, False, *tensors)
            if self.checkpoint_core_attention
            else function(*tensors)
        )

    def _compute_and_apply(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Output [S, B, H * D] and weights [B, H, S, T] of query [S, B, H, D], key and value [S, B, G, D]."""
        group = self.pg_collection.cp
        q_BHSD, k_BGTD = query.permute(1, 2, 0, 3), self._whole(key)
        weights_BHST = attention_weights(
            q_BHSD, k_BGTD, places(query.shape[0], group, query.device), self.core_attention.scale
        )
        return self._apply_weights(weights_BHST, value), weights_BHST

    def _apply_weights(self, weights_BHST: Tensor, value: Tensor) -> Tensor:
        """[S, B, H * D]."""
        dropout = self.core_attention.dropout if self.training else 0.0
        if dropout > 0.0 and not self.config.sequence_parallel:
            # As in SdpaAttention: heads differ between tensor-parallel ranks, so must their dropout.
            with tensor_parallel.get_cuda_rng_tracker().fork():
                weights_BHST = F.dropout(weights_BHST, dropout)
        elif dropout > 0.0:
            weights_BHST = F.dropout(weights_BHST, dropout)
        out_BHSD = weighted_values(weights_BHST, self._whole(value))
        return out_BHSD.permute(2, 0, 1, 3).flatten(2)

    def _whole(self, x: Tensor) -> Tensor:
        """[B, G, T, D] of this rank's [S, B, G, D]."""
        x_BGTD, group = x.permute(1, 2, 0, 3), self.pg_collection.cp
        return gather_sequence(x_BGTD, group) if group.size() > 1 else x_BGTD

    def _value(self, hidden_states: Tensor) -> Tensor:
        """[S, B, G, D], by the value rows of the query/key/value projection alone.

        The rows are laid out group by group as q1 ... qR k v (attention.py:SelfAttention.get_query_key_value_tensors).
        """
        linear, groups, width = (
            self.linear_qkv,
            self.num_query_groups_per_partition,
            self.hidden_size_per_attention_head,
        )

        def rows(parameter: Tensor) -> Tensor:
            return parameter.unflatten(0, (groups, -1, width))[:, -1].flatten(0, 1)

        value = linear_with_grad_accumulation_and_async_allreduce(
            input=hidden_states,
            weight=rows(linear.weight),
            bias=None if linear.bias is None else rows(linear.bias),
            gradient_accumulation_fusion=False,
            allreduce_dgrad=linear.allreduce_dgrad,
            sequence_parallel=linear.sequence_parallel,
            tp_group=linear.tp_group,
        )
        unused = [p for norm in (self.q_layernorm, self.k_layernorm) if norm is not None for p in norm.parameters()]
        return _ZeroGradient.apply(value, *unused).unflatten(-1, (groups, width))


class _ZeroGradient(torch.autograd.Function):
    """Gives parameters that a micro-batch does not use a gradient of zero: data parallelism waits for every one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def places(length: int, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """[S] where this rank's tokens stand in the sequence, split as `gather_sequence` says."""
    ranks, rank = group.size(), group.rank()
    if ranks == 1:
        return torch.arange(length, device=device)
    half = length // 2
    chunk = torch.arange(half, device=device)
    return torch.cat([chunk + rank * half, chunk + (2 * ranks - 1 - rank) * half])


def attention_weights(q_BHSD: Tensor, k_BGTD: Tensor, places_S: Tensor, scale: float) -> Tensor:
    """Causal softmax(Q K^T * scale), in fp32 inside.

    Args:
        q_BHSD: queries.
        k_BGTD: keys of the whole sequence.
        places_S: where the queries stand in the sequence.
        scale: of the products.

    Returns:
        [B, H, S, T], in the queries' type.
    """
    heads, queries = q_BHSD.shape[1:3]
    groups, keys = k_BGTD.shape[1:3]
    # The R heads of a group as more queries: keys need not be repeated. A mask that is added costs no pass of its own.
    q_NQD = q_BHSD.reshape(-1, heads // groups * queries, q_BHSD.shape[3])
    future_ST = torch.arange(keys, device=places_S.device) > places_S[:, None]
    mask_ST = torch.zeros(queries, keys, dtype=q_BHSD.dtype, device=q_BHSD.device).masked_fill(future_ST, float("-inf"))
    mask_QT = mask_ST.repeat(heads // groups, 1)
    scores_NQT = torch.baddbmm(mask_QT, q_NQD, k_BGTD.flatten(0, 1).transpose(1, 2), alpha=scale)
    scores_BHST = scores_NQT.view(-1, heads, queries, keys)
    return scores_BHST.softmax(dim=-1, dtype=torch.float32).to(q_BHSD.dtype)


def weighted_values(weights_BHST: Tensor, v_BGTD: Tensor) -> Tensor:
    """[B, H, S, D] = A V, with grouped heads."""
    batch, heads, queries, keys = weights_BHST.shape
    weights_BGQT = weights_BHST.reshape(batch, v_BGTD.shape[1], -1, keys)
    return (weights_BGQT @ v_BGTD).view(batch, heads, queries, -1)
