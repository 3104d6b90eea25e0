"""Arithmetic of one training step, for the TFLOP/s that a run reports."""

from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import expert_layout


def forward_flops_per_token(run: RunConfig) -> float:
    """Floating-point operations of the forward pass per token, 2 per multiply-add of a matrix product.

    Counts the projections, causal attention (half of the S x S products), dense MLPs, the experts a token uses, shared
    and residual MLPs, expert residual networks, routers and the output layer; norms, softmaxes and activations are
    left out, and so is what padding, dropping or recompute add or save.
    """
    model, moe = run.model, run.moe
    h, heads, groups, d = model.hidden_size, model.num_attention_heads, model.query_groups, model.head_dim
    attention = 2 * h * d * (heads + 2 * groups) + 2 * heads * d * h + 2 * 2 * heads * d * model.seq_length / 2
    matrices = 3 if model.swiglu else 2

    def mlp(width: int) -> float:
        return 2 * matrices * h * width

    total = model.num_layers * attention
    for experts in expert_layout(model, moe).experts_per_layer:
        if not experts:
            total += mlp(model.ffn_size)
            continue
        total += moe.moe_router_topk * mlp(run.expert_ffn_size) + 2 * h * experts
        if moe.mlp_type == "residual":
            total += mlp(run.expert_ffn_size) + 2 * h * 2
        if moe.use_expert_residual_network:
            total += moe.expert_residual_layers * 2 * 2 * h * (4 * h)
        if moe.moe_shared_expert_intermediate_size is not None:
            total += mlp(moe.moe_shared_expert_intermediate_size)
    return total + 2 * h * model.padded_vocab_size


def training_flops_per_token(run: RunConfig) -> float:
    """Forward and backward: the backward pass computes two products for each of the forward's."""
    return 3 * forward_flops_per_token(run)
