"""Arithmetic of one training step, for the TFLOP/s that a run reports."""

from megatron_moe.config.attention import computed_share, is_cross_layer
from megatron_moe.config.model import ModelConfig
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
    if model.multi_latent_attention:
        attention = _latent_flops(model)
    cross_layers = sum(is_cross_layer(number, model.cla_share_factor) for number in range(1, model.num_layers + 1))
    matrices = 3 if model.swiglu else 2

    def mlp(width: int) -> float:
        return 2 * matrices * h * width

    total = model.num_layers * attention - cross_layers * 2 * h * d * 2 * groups
    for experts in expert_layout(model, moe).experts_per_layer:
        if not experts:
            total += mlp(model.ffn_size)
            continue
        total += moe.moe_router_topk * mlp(run.expert_ffn_size) + _router_flops(run, experts)
        if moe.mlp_type == "residual":
            total += mlp(run.expert_ffn_size) + 2 * h * 2
        if moe.use_expert_residual_network:
            total += moe.expert_residual_layers * 2 * 2 * h * (4 * h)
        if moe.moe_shared_expert_intermediate_size is not None:
            total += mlp(moe.moe_shared_expert_intermediate_size)
    return total + 2 * h * model.padded_vocab_size


def _latent_flops(model: ModelConfig) -> float:
    """Multi-latent attention of one layer: projections down and up, attention over heads of two widths, the output."""
    h, heads, d, rank = model.hidden_size, model.num_attention_heads, model.head_dim, model.q_lora_rank
    query = 2 * h * heads * d if rank is None else 2 * rank * (h + heads * d)
    down = 2 * h * (model.kv_lora_rank + model.qk_pos_emb_head_dim)
    up = 2 * model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim)
    scores = 2 * heads * (d + model.v_head_dim) * model.seq_length / 2
    return query + down + up + scores + 2 * heads * model.v_head_dim * h


def _router_flops(run: RunConfig, experts: int) -> float:
    """A look into a table costs nothing."""
    if run.moe.router in ("hash", "random-routed"):
        return 0.0
    width = run.routing.router_embedding_size if run.moe.router == "token-embedding" else run.model.hidden_size
    return 2.0 * width * experts


def training_flops_per_token(run: RunConfig) -> float:
    """Forward and backward: the backward pass computes two products for each of the forward's.

    A layer that uses the attention weights of the layer before is spared its queries, keys and their product.
    """
    model = run.model
    heads, groups, d = model.num_attention_heads, model.query_groups, model.head_dim
    weights = 2 * model.hidden_size * d * (heads + groups) + 2 * heads * d * model.seq_length / 2
    reused = model.num_layers * (1.0 - computed_share(model)) * weights
    return 3 * (forward_flops_per_token(run) - reused)
