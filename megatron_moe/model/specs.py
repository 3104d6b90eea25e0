"""Layer specs: which class stands for which part of a layer, for the local and the Transformer Engine backend.

megatron-core's own spec helpers build one MoE spec for all layers and never set the router
(`models/gpt/moe_module_specs.py`), so the layer spec is put together here from upstream's parts.
"""

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_moe.config.attention import is_cross_layer
from megatron_moe.config.base import ConfigError
from megatron_moe.model.attention import SdpaAttention
from megatron_moe.model.cross_layer_attention import (
    CrossLayerAttention,
    CrossLayerSubmodules,
    SharingSelfAttention,
)
from megatron_moe.model.latent_attention import LatentAttention
from megatron_moe.model.layer import CarryingLayer
from megatron_moe.model.mlp import DenseMlp
from megatron_moe.model.norms import build_norm
from megatron_moe.model.projection_norm import ProjectionNorm
from megatron_moe.model.transformer_config import LatentTransformerConfig, PyramidTransformerConfig
from megatron_moe.model.weight_reuse import ReusingAttention, ReusingLayer
from megatron_moe.moe.expert_residual import ExpertResidualSubmodules
from megatron_moe.moe.experts import expert_builder
from megatron_moe.moe.layer import PyramidMoELayer, PyramidMoESubmodules
from megatron_moe.moe.routers import router_class


class LocalBackend(LocalSpecProvider):
    """megatron-core's plain torch modules, with this package's norms, attention and experts."""

    def __init__(self, core_attention: type) -> None:
        self._core_attention = core_attention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> Any:
        """Norms that work with sequence parallelism."""
        return build_norm

    def core_attention(self) -> type:
        """The chosen core attention."""
        return self._core_attention


def get_backend(config: PyramidTransformerConfig, attention_backend: str) -> BackendSpecProvider:
    """The provider of a layer's parts.

    Raises:
        ConfigError: Transformer Engine was asked for and is not installed.
    """
    if config.transformer_impl == "local":
        return LocalBackend(SdpaAttention if attention_backend == "sdpa" else DotProductAttention)
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise ConfigError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed; "
            "pip install 'megatron_moe[te]' on a machine with CUDA, or use --transformer-impl local"
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def block_spec(
    config: PyramidTransformerConfig, attention_backend: str, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Specs of the layers that this pipeline stage (and virtual stage) builds."""
    backend = get_backend(config, attention_backend)
    offset = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    counts = config.experts_per_layer[offset : offset + count]
    rms_norm = config.normalization == "RMSNorm"
    return TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(config, backend, number=offset + place, is_moe=experts > 0)
            for place, experts in enumerate(counts, 1)
        ],
        layer_norm=backend.layer_norm(rms_norm=rms_norm),
    )


def layer_spec(
    config: PyramidTransformerConfig, backend: BackendSpecProvider, *, number: int, is_moe: bool
) -> ModuleSpec:
    """Layer `number`, counted from 1 over the whole model, dense or MoE; its config knows how many experts it has."""
    rms_norm = config.normalization == "RMSNorm"
    fused = backend.fuse_layernorm_and_linear()
    norm = backend.layer_norm(rms_norm=rms_norm, has_residual=True)
    return ModuleSpec(
        module=layer_class(config),
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fused else norm,
            self_attention=attention_spec(config, backend, number),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm if is_moe or not fused else IdentityOp,
            mlp=moe_spec(config, backend) if is_moe else dense_spec(backend, fused),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def layer_class(config: PyramidTransformerConfig) -> type[TransformerLayer]:
    """Upstream's layer, or one that hands something on to the next."""
    if config.attention_weight_reuse_prob < 1.0:
        return ReusingLayer
    return CarryingLayer if config.cla_share_factor > 1 else TransformerLayer


def attention_spec(config: PyramidTransformerConfig, backend: BackendSpecProvider, number: int) -> ModuleSpec:
    """The attention of layer `number`."""
    if isinstance(config, LatentTransformerConfig):
        return latent_attention_spec(config, backend)
    fused = backend.fuse_layernorm_and_linear()
    q_norm = k_norm = IdentityOp
    if config.qk_layernorm:
        q_norm = k_norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)
    if config.qk_layernorm_type == "projection":
        q_norm = partial(ProjectionNorm, heads=config.num_attention_heads)
        k_norm = partial(ProjectionNorm, heads=config.num_query_groups)
    parts: dict[str, Any] = {
        "core_attention": backend.core_attention(),
        "linear_proj": backend.row_parallel_linear(),
        "q_layernorm": q_norm,
        "k_layernorm": k_norm,
    }
    projection = backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear()
    params = {"attn_mask_type": AttnMaskType.causal}
    if is_cross_layer(number, config.cla_share_factor):
        queries = CrossLayerSubmodules(linear_q=projection, **parts)
        return ModuleSpec(module=CrossLayerAttention, params=params, submodules=queries)
    module: type[SelfAttention] = SelfAttention
    if config.cla_share_factor > 1:
        module = SharingSelfAttention
    elif config.attention_weight_reuse_prob < 1.0:
        module = ReusingAttention
    return ModuleSpec(module=module, params=params, submodules=SelfAttentionSubmodules(linear_qkv=projection, **parts))


def latent_attention_spec(config: LatentTransformerConfig, backend: BackendSpecProvider) -> ModuleSpec:
    """Multi-latent attention of the local backend."""
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm") if config.normalise_latents else IdentityOp
    column = backend.column_parallel_linear()
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=IdentityOp if config.q_lora_rank is None else norm,
            kv_layernorm=norm,
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=backend.core_attention(),
        ),
    )


def dense_spec(backend: BackendSpecProvider, fused: bool) -> Any:
    """Builder of a dense MLP."""
    first = backend.column_parallel_layer_norm_linear() if fused else backend.column_parallel_linear()
    return partial(
        DenseMlp.as_mlp_submodule,
        submodules=MLPSubmodules(linear_fc1=first, linear_fc2=backend.row_parallel_linear()),
    )


def moe_spec(config: PyramidTransformerConfig, backend: BackendSpecProvider) -> Any:
    """Builder of an MoE layer: router by name, experts by backend, residual and shared MLPs where asked for."""
    mlp = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    return partial(
        PyramidMoELayer,
        submodules=PyramidMoESubmodules(
            experts=expert_builder(config.expert_backend),
            shared_experts=partial(SharedExpertMLP, submodules=mlp),
            router=router_class(config.router_type),
            residual=mlp,
            expert_residual=ExpertResidualSubmodules(
                norm=backend.layer_norm(rms_norm=config.normalization == "RMSNorm"), mlp=mlp
            ),
        ),
    )
