"""Multi-latent attention (DeepSeek-V2, arXiv 2405.04434): megatron-core's, with plain torch modules.

A token's hidden state is projected down to a latent vector, from which the keys and values of all heads are projected
up, and to one small key that is rotated and that all heads share. Queries may have a latent vector too. A cache keeps
the keys and values of all heads, as upstream's for static batches does, not the latent vectors.

Shape legend: S = tokens on this rank, B = batch, L = width of the latent vector, P = rotated channels.
"""

from typing import Any

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from torch import Tensor, cat


class LatentAttention(MLASelfAttention):
    """Upstream's for linear layers without norms of their own, with the gradient of the shared key made whole.

    `MLASelfAttention.get_query_key_value_tensors` gathers the output of a column-parallel down projection and gives
    each rank the gradient of its own part, which for the shared key is that of its own heads only. It leaves alone what
    `_qkv_down_projection` has gathered already, so that is done here.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """What the spec says. Upstream normalises a query without a latent vector too, and refuses to do so without
        Transformer Engine (`mla_qk_norm_config.py:QKNormConfigResolver`); DeepSeek does not."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The query's latent vector, or the hidden states where it has none, and [S, B, L + P] of key and value."""
        query, mixed = super()._qkv_down_projection(hidden_states)
        group = self.pg_collection.tp
        if group.size() == 1:
            return query, mixed
        mixed = gather_from_tensor_model_parallel_region(mixed, group=group)
        if self.config.sequence_parallel:
            # Upstream gathers the shared key again, which sums its gradient over the ranks.
            return query, scatter_to_sequence_parallel_region(mixed, group=group)
        latent, key = mixed.split([self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim], dim=-1)
        return query, cat([latent, copy_to_tensor_model_parallel_region(key, group=group)], dim=-1)
