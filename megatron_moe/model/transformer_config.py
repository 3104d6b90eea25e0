"""megatron-core's `TransformerConfig` for a run, with one expert count per layer.

The one supported hook for layers that differ is `get_config_for_layer`, called by
`megatron/core/transformer/transformer_block.py:TransformerBlock._build_layers` when `heterogeneous_block_specs` is
set. Everything inside an MoE layer reads its count from the config it was built with, so a copy per layer suffices.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megatron_moe.config.model import LATENT_FLAGS, YARN_FLAGS, ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.routing import RoutingConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.experts.activations import gelu_tanh, squared_relu
from megatron_moe.moe.layout import expert_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class PyramidTransformerConfig(TransformerConfig):
    """`TransformerConfig` plus what this package's MoE layers need."""

    experts_per_layer: tuple[int, ...] = ()
    """Experts of each layer, 0 for a dense one; as long as the model is deep."""
    residual_mlp: bool = False
    """A dense MLP beside the experts of every MoE layer."""
    residual_combine: str = "softmax"
    """`softmax` or `add`."""
    router_type: str = "topk"
    """Key into `megatron_moe.config.routers.ROUTERS`."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """Flags of single routers."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Flags of the experts that upstream's config has no field for."""
    expert_backend: str = "grouped"
    """`grouped`, `sequential` or `te`."""
    ranks_per_node: int | None = None
    """Processes of a node; None: as the launcher says."""
    distributed_timeout_minutes: int = 10
    """Of process groups that layers make for themselves (`moe/expert_parallel.py`)."""
    seed: int = 0
    """Of the run, for random numbers that belong to tokens (`moe/token_random.py`)."""
    vocab_rows: int = 0
    """Token ids a router may meet: the padded vocabulary; 0 where a test builds parts without one."""
    domains: int = 1
    """Domains of the text."""
    has_cond_embedder: bool = False
    """Upstream's name: parameters marked `pipeline_parallel` have copies on every pipeline stage, whose gradients are
    summed (`distributed/finalize_model_grads.py:_allreduce_conditional_embedding_grads`)."""
    attention_weight_reuse_prob: float = 1.0
    """Probability that a layer computes its attention weights (`model/weight_reuse.py`)."""
    attention_weight_reuse_span: int = 1
    """Layers 1, span+1, ... always compute them."""
    qk_layernorm_type: str = "head"
    """`head` or `projection` (`model/projection_norm.py`)."""
    cla_share_factor: int = 1
    """Layers 1, factor+1, ... have keys and values (`model/cross_layer_attention.py`)."""

    def __post_init__(self) -> None:
        # Upstream refuses biases in experts under expert tensor parallelism, because it would count them once per
        # rank (transformer_config.py: "Bias in Moe is only supported when ETP==1"); moe/experts counts them once.
        bias = vars(self)["add_bias_linear"]
        self.add_bias_linear = bias and vars(self)["transformer_impl"] != "local"
        super().__post_init__()
        self.add_bias_linear = bias

    def get_config_for_layer(self, layer_number: int) -> "PyramidTransformerConfig":
        """Config of layer `layer_number`, counted from 1 over the whole model."""
        layer_config = copy.copy(self)
        layer_config.num_moe_experts = self.experts_per_layer[layer_number - 1] or self.num_moe_experts
        return layer_config


@dataclass
class LatentTransformerConfig(PyramidTransformerConfig, MLATransformerConfig):
    """The same for multi-latent attention (`model/latent_attention.py`)."""

    normalise_latents: bool = False
    """Norms on the latent vectors. Upstream's `qk_layernorm` stays off: it would sum the gradients of their weights
    over the tensor-parallel ranks, each of which has the whole
    (`distributed/finalize_model_grads.py:_allreduce_non_tensor_model_parallel_grads`)."""


def build_transformer_config(run: RunConfig, *, inference: bool = False) -> PyramidTransformerConfig:
    """Translate a run's flags.

    Args:
        run: the resolved flags; sizes are validated already (`config/validate.py`).
        inference: without dropout, token dropping and sequence parallelism, which would need sequences that the
            tensor-parallel size divides.
    """
    model, parallel, training = run.model, run.parallel, run.training
    dtype = DTYPES[training.precision]
    layout = expert_layout(model, run.moe)
    has_experts = layout.num_moe_layers > 0
    interleaved = parallel.num_layers_per_virtual_pipeline_stage is not None
    kind, latent = _latent(model)
    return kind(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=_activation(model),
        add_bias_linear=not model.disable_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm and not model.multi_latent_attention,
        qk_layernorm_type=model.qk_layernorm_type,
        attention_dropout=0.0 if inference else model.attention_dropout,
        hidden_dropout=0.0 if inference else model.hidden_dropout,
        init_method_std=model.init_method_std,
        # Weights are drawn by model/init.py, the same for every layout.
        perform_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.bf16,
        fp16=training.fp16,
        transformer_impl=model.transformer_impl,
        attention_softmax_in_fp32=True,
        # These fusions need Apex, or compile at run time.
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=run.virtual_stages,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size if has_experts else 1,
        expert_tensor_parallel_size=parallel.expert_tensor_size,
        sequence_parallel=run.uses_sequence_parallel and not inference,
        # With two stages that are each other's neighbours on both sides, one batch of sends and receives pairs them
        # by order: activations and gradients get mixed up. Separate operations go through separate groups.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=True,
        # The mean over all tokens of a step, whatever the number of micro-batches and ranks.
        calculate_per_token_loss=True,
        **latent,
        **_recompute(run, inference),
        **(_experts(run, inference) if has_experts else {}),
        heterogeneous_block_specs=has_experts,
        experts_per_layer=layout.experts_per_layer,
        routing=run.routing,
        moe=run.moe,
        expert_backend=run.expert_backend,
        ranks_per_node=run.parallel.ranks_per_node,
        distributed_timeout_minutes=run.parallel.distributed_timeout_minutes,
        seed=training.seed,
        vocab_rows=model.padded_vocab_size if model.vocab_size else 0,
        attention_weight_reuse_prob=1.0 if inference else model.attention_weight_reuse_prob,
        attention_weight_reuse_span=model.attention_weight_reuse_span or model.num_layers,
        cla_share_factor=model.cla_share_factor,
        domains=model.num_domains or 1,
        has_cond_embedder=has_experts and run.shares_routing_embedding,
    )


def _latent(model: ModelConfig) -> tuple[type[PyramidTransformerConfig], dict[str, Any]]:
    """The config's class, and the fields of multi-latent attention."""
    if not model.multi_latent_attention:
        return PyramidTransformerConfig, {}
    return LatentTransformerConfig, {
        "multi_latent_attention": True,
        **{name: getattr(model, name) for name in LATENT_FLAGS},
        "normalise_latents": model.qk_layernorm,
        "rope_type": "rope" if model.rotary_scaling_factor is None else "yarn",
        "rotary_base": model.rotary_base,
        "rotary_scaling_factor": model.rotary_scaling_factor or 1.0,
        **{name: getattr(model, name) for name in YARN_FLAGS},
    }


def _activation(model: ModelConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    if model.swiglu:
        return F.silu
    if model.gelu_tanh:
        return gelu_tanh
    return squared_relu if model.squared_relu else F.gelu


def _recompute(run: RunConfig, inference: bool) -> dict[str, Any]:
    granularity = None if inference else run.training.granularity
    if granularity is None:
        return {}
    if granularity == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(run.training.recompute_modules or ("core_attn",)),
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": run.training.recompute_method,
        "recompute_num_layers": run.training.recompute_num_layers or 1,
    }


def _capacity_factor(moe: MoEConfig, inference: bool) -> float | None:
    # Without one, upstream's dispatcher expects exactly top-k experts of every token
    # (token_dispatcher.py:MoEAlltoAllTokenDispatcher.preprocess), which expert choice has not.
    if moe.router == "expert-choice":
        return moe.moe_expert_capacity_factor or 1.0
    return None if inference else moe.moe_expert_capacity_factor


def _experts(run: RunConfig, inference: bool) -> dict[str, Any]:
    moe = run.moe
    layout = expert_layout(run.model, moe)
    sigmoid = moe.moe_router_score_function == "sigmoid"
    return {
        "num_moe_experts": layout.max_experts,
        "moe_layer_freq": [1 if count else 0 for count in layout.experts_per_layer],
        "residual_mlp": moe.mlp_type == "residual",
        "residual_combine": moe.residual_combine,
        "router_type": moe.router,
        "moe_ffn_hidden_size": run.expert_ffn_size,
        "moe_router_topk": moe.moe_router_topk,
        "moe_router_score_function": moe.moe_router_score_function,
        "moe_router_pre_softmax": moe.pre_softmax and not sigmoid,
        "moe_router_topk_scaling_factor": moe.moe_router_topk_scaling_factor,
        "moe_router_num_groups": moe.moe_router_num_groups,
        "moe_router_group_topk": moe.moe_router_group_topk,
        "moe_router_load_balancing_type": moe.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": 0.0 if moe.moe_router_load_balancing_type == "none" else moe.moe_aux_loss_coeff,
        # Upstream divides by it when it reports the loss.
        "moe_z_loss_coeff": moe.moe_z_loss_coeff or None,
        "moe_router_enable_expert_bias": moe.moe_router_enable_expert_bias,
        "moe_router_bias_update_rate": moe.moe_router_bias_update_rate,
        "moe_router_dtype": moe.moe_router_dtype,
        "moe_input_jitter_eps": None if inference else moe.moe_input_jitter_eps,
        "moe_expert_capacity_factor": _capacity_factor(moe, inference),
        "moe_pad_expert_input_to_capacity": moe.moe_pad_expert_input_to_capacity and not inference,
        "moe_token_drop_policy": moe.moe_token_drop_policy,
        "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": moe.moe_shared_expert_gate,
        # Upstream knows no `grouped`: the layer puts it in place of the one that upstream builds (moe/layer.py).
        "moe_token_dispatcher_type": moe.moe_token_dispatcher_type.replace("grouped", "alltoall"),
        # Upstream's word for Transformer Engine's experts.
        "moe_grouped_gemm": run.expert_backend == "te",
    }
