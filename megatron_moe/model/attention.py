"""Core attention through torch's `scaled_dot_product_attention`: no mask tensor, no S x S matrix kept.

Takes the place of `megatron/core/transformer/dot_product_attention.py:DotProductAttention` in the layer spec and
adds context parallelism, which upstream offers with Transformer Engine only. Upstream's recompute fails in the
causal mask it allocates; there is none here.

Shape legend: S = queries on this rank, T = keys, B = batch, H = heads on this rank, G = key/value heads on this
rank, D = head width, C = context-parallel ranks.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right


class SdpaAttention(MegatronModule):
    """Causal (or, while decoding with a cache, unmasked) attention over the heads of this rank."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert config.kv_channels is not None
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [S, B, H, D].
            key: [T, B, G, D].
            value: [T, B, G, D], or of another width.
            attention_mask: must be None; the mask is implied.
            attn_mask_type: `no_mask` while decoding one token with a cache, else causal.
            attention_bias: must be None.
            packed_seq_params: must be None.

        Returns:
            [S, B, H * D].
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError("SdpaAttention: masks, biases and packed sequences are not supported")
        causal = (attn_mask_type or self.attn_mask_type) == AttnMaskType.causal
        dropout = self.dropout if self.training else 0.0
        q_BHSD, k_BGTD, v_BGTD = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        if dropout > 0.0 and not self.config.sequence_parallel:
            # Heads differ between tensor-parallel ranks, so must their dropout; with sequence parallelism upstream
            # has forked the generator already (transformer_block.py).
            with tensor_parallel.get_cuda_rng_tracker().fork():
                out_BHSD = self._attend(q_BHSD, k_BGTD, v_BGTD, causal, dropout)
        else:
            out_BHSD = self._attend(q_BHSD, k_BGTD, v_BGTD, causal, dropout)
        return out_BHSD.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attend(self, q_BHSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, causal: bool, dropout: float) -> Tensor:
        if causal and self.cp_group is not None and self.cp_group.size() > 1:
            return self._attend_across_ranks(q_BHSD, k_BGTD, v_BGTD, dropout)
        return attention(q_BHSD, k_BGTD, v_BGTD, causal=causal, dropout=dropout, scale=self.scale)

    def _attend_across_ranks(self, q_BHSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, dropout: float) -> Tensor:
        """Attention when rank r of C holds the chunks r and 2C-1-r of the sequence (Megatron's balanced split).

        Keys and values are gathered; each of the two query chunks then attends to its own prefix.
        """
        assert self.cp_group is not None
        ranks, rank = self.cp_group.size(), self.cp_group.rank()
        k_all = gather_sequence(k_BGTD, self.cp_group)
        v_all = gather_sequence(v_BGTD, self.cp_group)
        outputs = []
        for q_chunk, chunk in zip(q_BHSD.chunk(2, dim=2), (rank, 2 * ranks - 1 - rank), strict=True):
            end = (chunk + 1) * q_chunk.shape[2]
            prefix = (k_all[:, :, :end], v_all[:, :, :end])
            outputs.append(attention(q_chunk, *prefix, causal=True, dropout=dropout, scale=self.scale))
        return torch.cat(outputs, dim=2)


def attention(q_BHSD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, *, causal: bool, dropout: float, scale: float) -> Tensor:
    """`scaled_dot_product_attention` with grouped heads; with fewer queries than keys the mask is aligned to the
    end, as a cache and context parallelism need it."""
    heads, groups = q_BHSD.shape[1], k_BGTD.shape[1]
    queries, keys = q_BHSD.shape[2], k_BGTD.shape[2]
    mask = causal_lower_right(queries, keys) if causal and queries not in (1, keys) else None
    grouped = heads != groups and q_BHSD.is_cuda and mask is None
    if heads != groups and not grouped:
        # torch's CPU flash kernel takes equal head counts only; its grouped fallback keeps the S x S matrix.
        k_BGTD = k_BGTD.repeat_interleave(heads // groups, dim=1)
        v_BGTD = v_BGTD.repeat_interleave(heads // groups, dim=1)
    width, most = v_BGTD.shape[3], max(q_BHSD.shape[3], v_BGTD.shape[3])
    if not q_BHSD.is_cuda and width != q_BHSD.shape[3]:
        # Nor does it take values of another width than keys: zeros add nothing.
        q_BHSD, k_BGTD, v_BGTD = (F.pad(part, (0, most - part.shape[3])) for part in (q_BHSD, k_BGTD, v_BGTD))
    out_BHSD = F.scaled_dot_product_attention(
        q_BHSD,
        k_BGTD,
        v_BGTD,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and queries == keys,
        scale=scale,
        enable_gqa=grouped,
    )
    return out_BHSD[..., :width]


class _GatherSequence(torch.autograd.Function):
    """All-gather along a new leading dimension; the gradient is reduce-scattered back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty((group.size(), *x.shape))
        dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_all = grads[0].contiguous()
        grad = torch.empty_like(grad_all[0])
        dist.reduce_scatter_tensor(grad.view(-1), grad_all.view(-1), group=ctx.group)
        return grad, None


def gather_sequence(x_BGTD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The whole sequence from its balanced shards.

    Args:
        x_BGTD: [B, G, T/C, D], this rank's chunks r and 2C-1-r one after the other.
        group: the C context-parallel ranks.

    Returns:
        [B, G, T, D] in sequence order, differentiable.
    """
    shards = _GatherSequence.apply(x_BGTD, group)
    first, second = zip(*(shard.chunk(2, dim=2) for shard in shards), strict=True)
    return torch.cat([*first, *reversed(second)], dim=2)
