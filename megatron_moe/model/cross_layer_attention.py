"""Cross-layer attention: a layer with keys and values, and layers after it that use them (Hunyuan-Large, CLA).

Layers 1, k+1, 2k+1, ... of `--cla-share-factor k` are upstream's self-attention; the layers between have a query
projection only. What they share is what the projection gives: every layer normalises and rotates the shared keys
itself, with its own norm weights, so that a cache of the layers with keys serves all. (As everywhere here, and unlike
Hunyuan's own code, heads are normalised before they are rotated.)

Shape legend: S = tokens on this rank (with sequence parallelism, of all tensor-parallel ranks), B = batch, H = heads on
this rank, G = key/value heads on this rank, D = head width.
"""

from dataclasses import dataclass
from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.typed_torch import apply_module
from torch import Tensor

from megatron_moe.config.attention import is_cross_layer, source_layer


class _SharedKeys(Attention):
    """Keys and values [S, B, G, 2 D] as they are shared travel in `carried`.

    Upstream calls `get_query_key_value_tensors`, then `_adjust_key_value_for_inference`, which writes keys and values
    to the cache and reads all of them, then rotates, then attends (attention.py:Attention.forward). Keys are left
    without their norm by the first, and get it after the second.

    Attributes:
        carried: see `model/layer.py:CarryingLayer`.
    """

    carried: Tensor | None = None
    k_layernorm: Any

    def _adjust_key_value_for_inference(self, inference_context: Any, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, with a cache of keys without norm."""
        if inference_context is not None and not inference_context.is_static_batching():
            raise NotImplementedError("cross-layer attention: its cache is for static batches")
        query, key, *rest = super()._adjust_key_value_for_inference(inference_context, *args, **kwargs)
        key = key if self.k_layernorm is None else apply_module(self.k_layernorm)(key)
        # The last of the layers that share lets go of what they share.
        share_factor = self.config.cla_share_factor
        if self.layer_number == self.config.num_layers or not is_cross_layer(self.layer_number + 1, share_factor):
            self.carried = None
        return query, key, *rest


class SharingSelfAttention(_SharedKeys, SelfAttention):
    """Self-attention that leaves its keys and values for the layers after it."""

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [S, B, H, D], key without norm, and value [S, B, G, D]."""
        width = self.hidden_size_per_attention_head
        mixed, _ = apply_module(self.linear_qkv)(hidden_states)
        # Group by group, as upstream lays it out: q1 ... qR k v.
        mixed = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
        query = mixed[..., : -2 * width].reshape(*mixed.shape[:2], -1, width)
        if self.q_layernorm is not None:
            query = apply_module(self.q_layernorm)(query)
        # A copy, so that a layer that uses it does not keep the queries too.
        self.carried = mixed[..., -2 * width :].contiguous()
        key, value = self.carried.split(width, dim=-1)
        return query, key, value


@dataclass
class CrossLayerSubmodules:
    """Builders of the parts."""

    linear_q: Any
    core_attention: Any
    linear_proj: Any
    q_layernorm: Any
    k_layernorm: Any


class CrossLayerAttention(_SharedKeys):
    """Attention with queries of its own over the keys and values that it finds in `carried`."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossLayerSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            # To upstream: queries and keys of the same sequence, rotated alike.
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            pp_layer_offset=pp_layer_offset,
            name=name,
        )
        self.linear_q = submodules.linear_q(
            config.hidden_size,
            self.query_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="q",
            tp_group=self.pg_collection.tp,
            name=None if name is None else f"{name}.linear_q",
        )
        norm = {"hidden_size": self.hidden_size_per_attention_head, "config": config, "eps": config.layernorm_epsilon}
        self.q_layernorm = submodules.q_layernorm(**norm) if config.qk_layernorm else None
        self.k_layernorm = submodules.k_layernorm(**norm) if config.qk_layernorm else None

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [S, B, H, D]; key without norm and value [S, B, G, D] of the layer that shares them."""
        assert self.carried is not None, f"layer {self.layer_number} found no keys and values"
        width = self.hidden_size_per_attention_head
        query, _ = apply_module(self.linear_q)(hidden_states)
        query = query.unflatten(-1, (-1, width))
        if self.q_layernorm is not None:
            query = apply_module(self.q_layernorm)(query)
        key, value = self.carried.split(width, dim=-1)
        return query, key, value

    def _adjust_key_value_for_inference(self, inference_context: Any, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, with the cache of the layer that shares: what it writes there, stands there already."""
        if inference_context is not None:
            memory = inference_context.key_value_memory_dict
            memory[self.layer_number] = memory[source_layer(self.layer_number, self.config.cla_share_factor)]
        return super()._adjust_key_value_for_inference(inference_context, *args, **kwargs)
