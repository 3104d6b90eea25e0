"""How many parameters a model has, from its flags alone: by component, per token, and per rank in bytes.

No torch here, so a 400 B model is counted in no time. The model itself, built on the meta device, must agree.
Published counts leave the vocabulary unpadded; a model that is built has it padded.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from megatron_moe.config.attention import is_cross_layer
from megatron_moe.config.run import RunConfig
from megatron_moe.moe.layout import ExpertLayout, expert_layout

FP32_BYTES = 4
HALF_BYTES = 2


@dataclass(frozen=True)
class Size:
    """Parameters of a module: those that tensor parallelism splits, and those every rank has whole."""

    split: int = 0
    whole: int = 0

    @property
    def total(self) -> int:
        """Parameters of the whole module."""
        return self.split + self.whole

    def on_rank(self, ranks: int) -> int:
        """Parameters that one of `ranks` tensor-parallel ranks holds."""
        return self.split // ranks + self.whole

    def __add__(self, other: "Size") -> "Size":
        return Size(self.split + other.split, self.whole + other.whole)

    def __mul__(self, times: int) -> "Size":
        return Size(self.split * times, self.whole * times)


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Parameters of the whole model by component. Each is counted once, however many ranks hold it."""

    embedding: int
    """Word embedding; the output projection too where it is tied."""
    positions: int
    """Table of learned positions."""
    domains: int
    """Domain embedding."""
    attention: int
    """Projections of all layers, and their query/key norms."""
    norms: int
    """Norms of all layers and the final one."""
    dense_mlp: int
    """MLPs of the dense layers."""
    residual_mlp: int
    """MLPs beside the experts, with their mixing coefficients."""
    expert_residual: int
    """Expert residual networks."""
    shared_experts: int
    """Experts that every token passes through, with their gates."""
    router: int
    """Routers of all MoE layers: one row for each expert, and routing embeddings."""
    experts: int
    """Routed experts of all MoE layers."""
    output: int
    """Output projection where it is not tied."""
    active_experts: int
    """The part of `experts` that one token passes through."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.components().values())

    @property
    def non_expert(self) -> int:
        """All but the routed experts and the routers, whose rows go with the experts: so it is published."""
        return self.total - self.experts - self.router

    @property
    def activated(self) -> int:
        """Parameters that one token passes through; routers whole."""
        return self.total - self.experts + self.active_experts

    def components(self) -> dict[str, int]:
        """The components by name; they sum to `total`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "active_experts"}


@dataclass(frozen=True, kw_only=True)
class BuiltCounts:
    """Parameters read off a model that was built (`meta.py`), with the padded vocabulary."""

    total: int
    """All parameters."""
    experts: int
    """Routed experts."""
    router: int
    """Routers."""

    @property
    def non_expert(self) -> int:
        """As `ParameterCounts.non_expert`."""
        return self.total - self.experts - self.router


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """What each rank of one pipeline stage holds, without activations and buffers."""

    stage: int
    """Counted from 0."""
    layers: tuple[int, ...]
    """Numbers of its layers, counted from 1."""
    parameters: int
    """Parameters on one rank."""
    weight_bytes: int
    """In the compute precision."""
    gradient_bytes: int
    """Gradients are kept and summed in fp32."""
    optimizer_bytes: int
    """fp32 master weights (bf16 and fp16 only) and moments; this rank's share with a distributed
    optimizer."""

    @property
    def total_bytes(self) -> int:
        """All three."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def count_parameters(run: RunConfig, *, padded_vocab: bool = False) -> ParameterCounts:
    """Count the parameters of a run's model.

    Args:
        run: the flags; needs --vocab-size. padded_vocab: count the embedding with the padded vocabulary, as
            the model is built, instead of as published.

    Raises:
        ConfigError: the vocabulary is not known, or the expert layout is illegal.
    """
    model, moe = run.model, run.moe
    layout = expert_layout(run)
    padded = model.padded_vocab_size  # raises when the vocabulary is not known
    vocabulary = padded if padded_vocab or model.vocab_size is None else model.vocab_size
    word_table = vocabulary * model.hidden_size
    expert = expert_size(run).total
    untied = model.untie_embeddings_and_output_weights
    return ParameterCounts(
        embedding=word_table,
        positions=positions_size(run).total,
        domains=domains_size(run).total,
        attention=sum(attention_size(run, number).total for number in range(1, model.num_layers + 1)),
        norms=norm_size(run, model.hidden_size).total * (2 * model.num_layers + 1),
        dense_mlp=mlp_size(run, model.ffn_size).total * (model.num_layers - layout.num_moe_layers),
        residual_mlp=residual_size(run).total * layout.num_moe_layers,
        expert_residual=expert_residual_size(run).total * layout.num_moe_layers,
        shared_experts=shared_expert_size(run).total * layout.num_moe_layers,
        router=sum(router_size(run, count, vocabulary).total for count in layout.counts)
        + shared_routing_size(run, layout, vocabulary).total,
        experts=expert * layout.total_experts,
        output=word_table if untied else 0,
        active_experts=expert * moe.moe_router_topk * layout.num_moe_layers,
    )


def stage_memory(run: RunConfig, world_size: int) -> list[StageMemory]:
    """Weights, gradients and optimizer state on a rank of every pipeline stage.

    Raises:
        ConfigError: the parallel sizes do not fit `world_size`, or the vocabulary is not known.
    """
    parallel = run.parallel
    layout = expert_layout(run)
    dense_replicas = parallel.data_parallel_size(world_size) * parallel.context_parallel_size
    expert_ranks = parallel.expert_tensor_size * parallel.expert_model_parallel_size
    expert_replicas = world_size // (expert_ranks * parallel.pipeline_model_parallel_size)
    per_weight = FP32_BYTES if run.training.precision == "fp32" else HALF_BYTES
    stages = []
    for stage, layers in enumerate(stage_layers(run)):
        dense = _dense_size(run, stage, layers, layout).on_rank(parallel.tensor_model_parallel_size)
        experts = _experts_on_rank(run, layers, layout)
        state = _sharded(run, dense, dense_replicas) + _sharded(run, experts, expert_replicas)
        stages.append(
            StageMemory(
                stage=stage,
                layers=layers,
                parameters=dense + experts,
                weight_bytes=(dense + experts) * per_weight,
                gradient_bytes=(dense + experts) * FP32_BYTES,
                optimizer_bytes=state * _state_bytes(run),
            )
        )
    return stages


def stage_layers(run: RunConfig) -> list[tuple[int, ...]]:
    """Numbers (from 1) of the layers of every pipeline stage; interleaved stages hold several stretches."""
    stages = run.parallel.pipeline_model_parallel_size
    stretch = run.parallel.num_layers_per_virtual_pipeline_stage or run.model.num_layers // stages
    owners = [((number - 1) // stretch) % stages for number in range(1, run.model.num_layers + 1)]
    return [tuple(number for number, owner in enumerate(owners, 1) if owner == stage) for stage in range(stages)]


def attention_size(run: RunConfig, number: int = 1) -> Size:
    """The attention of layer `number`: the query/key/value and the output projection, and the query/key norms."""
    model = run.model
    if model.multi_latent_attention:
        return _latent_attention_size(run)
    query = model.num_attention_heads * model.head_dim
    cross = is_cross_layer(number, model.cla_share_factor)
    qkv = query if cross else query + 2 * model.query_groups * model.head_dim
    size = Size(split=model.hidden_size * (qkv + query))
    if not model.disable_bias_linear or model.add_qkv_bias:
        size += Size(split=qkv)
    if not model.disable_bias_linear:
        size += Size(whole=model.hidden_size)
    if model.qk_layernorm:
        alone = model.qk_layernorm_type == "head"
        for heads in (model.num_attention_heads, model.query_groups):
            size += norm_size(run, model.head_dim * (1 if alone else heads))
    return size


def _latent_attention_size(run: RunConfig) -> Size:
    """Projections down, which tensor parallelism splits too, up, and of the output; norms of the latent vectors."""
    model = run.model
    hidden, heads = model.hidden_size, model.num_attention_heads
    latents = [model.kv_lora_rank]
    size = Size(split=hidden * (model.kv_lora_rank + model.qk_pos_emb_head_dim))
    size += Size(split=model.kv_lora_rank * heads * (model.qk_head_dim + model.v_head_dim))
    size += Size(split=heads * model.v_head_dim * hidden)
    if model.q_lora_rank is None:
        size += Size(split=hidden * heads * model.head_dim)
    else:
        size += Size(split=model.q_lora_rank * (hidden + heads * model.head_dim))
        latents.append(model.q_lora_rank)
    if not model.disable_bias_linear:
        size += Size(whole=hidden)
    for width in latents if model.qk_layernorm else ():
        size += norm_size(run, width)
    return size


def mlp_size(run: RunConfig, width: int) -> Size:
    """An MLP or expert of `width`. The gate of SwiGLU doubles its first matrix."""
    model = run.model
    first = width * (2 if model.swiglu else 1)
    size = Size(split=model.hidden_size * (first + width))
    if not model.disable_bias_linear:
        size += Size(split=first, whole=model.hidden_size)
    return size


def norm_size(run: RunConfig, width: int) -> Size:
    """One norm over `width` channels."""
    return Size(whole=2 * width if run.model.normalization == "LayerNorm" else width)


def positions_size(run: RunConfig) -> Size:
    """The table of learned positions, if there is one."""
    learned = run.model.position_embedding_type == "learned_absolute"
    return Size(whole=run.model.max_positions * run.model.hidden_size if learned else 0)


def expert_size(run: RunConfig) -> Size:
    """One routed expert."""
    return mlp_size(run, run.expert_ffn_size)


def residual_size(run: RunConfig) -> Size:
    """The dense MLP beside one layer's experts, of an expert's width, and its mixing coefficients."""
    if run.moe.mlp_type != "residual":
        return Size()
    coefficients = 2 * run.model.hidden_size + 2 if run.moe.residual_combine == "softmax" else 0
    return expert_size(run) + Size(whole=coefficients)


def expert_residual_size(run: RunConfig) -> Size:
    """One layer's expert residual network: blocks of a norm and an MLP of four times the hidden size, without gate."""
    if not run.moe.use_expert_residual_network:
        return Size()
    hidden = run.model.hidden_size
    block = Size(split=2 * 4 * hidden * hidden) + norm_size(run, hidden)
    if not run.model.disable_bias_linear:
        block += Size(split=4 * hidden, whole=hidden)
    return block * run.moe.expert_residual_layers


def shared_expert_size(run: RunConfig) -> Size:
    """The shared expert of one layer and its gate."""
    width = run.moe.moe_shared_expert_intermediate_size
    if width is None:
        return Size()
    return mlp_size(run, width) + Size(whole=run.model.hidden_size if run.moe.moe_shared_expert_gate else 0)


def domains_size(run: RunConfig) -> Size:
    """The domain embedding, if there is one."""
    model = run.model
    return Size(whole=(model.num_domains or 0) * model.hidden_size if model.domain_embedding else 0)


def router_size(run: RunConfig, experts: int, vocabulary: int) -> Size:
    """The router of a layer with that many experts; it has no bias. Fixed maps are no parameters."""
    router = run.moe.router
    if router in ("hash", "random-routed") or run.shares_routing_embedding:
        return Size()
    if router == "token-embedding":
        return Size(whole=(vocabulary + experts) * run.routing.router_embedding_size)
    return Size(whole=experts * run.model.hidden_size)


def shared_routing_size(run: RunConfig, layout: ExpertLayout, vocabulary: int) -> Size:
    """The routing embedding that all layers share, with a gate for every number of experts."""
    if not run.shares_routing_embedding or not layout.num_moe_layers:
        return Size()
    return Size(whole=(vocabulary + sum(set(layout.counts))) * run.routing.router_embedding_size)


def _dense_size(run: RunConfig, stage: int, layers: Iterable[int], layout: ExpertLayout) -> Size:
    """Everything of a stage but the routed experts."""
    model = run.model
    last = run.parallel.pipeline_model_parallel_size - 1
    table = Size(split=model.padded_vocab_size * model.hidden_size)
    # Every model chunk has a copy.
    size = shared_routing_size(run, layout, model.padded_vocab_size) * (run.virtual_stages or 1)
    if stage == 0:
        size += table + positions_size(run) + domains_size(run)
    if stage == last:
        size += norm_size(run, model.hidden_size)
        # The last stage projects with the embedding: its own copy, unless it is the first stage as well.
        if model.untie_embeddings_and_output_weights or last > 0:
            size += table
    for number in layers:
        experts = layout.experts_in(number)
        size += attention_size(run, number) + norm_size(run, model.hidden_size) * 2
        if experts:
            size += residual_size(run) + expert_residual_size(run) + shared_expert_size(run)
            size += router_size(run, experts, model.padded_vocab_size)
        else:
            size += mlp_size(run, model.ffn_size)
    return size


def _experts_on_rank(run: RunConfig, layers: Iterable[int], layout: ExpertLayout) -> int:
    """Parameters of the routed experts that one rank of a stage holds."""
    size = run.parallel.expert_model_parallel_size
    local = sum(layout.experts_in(n) // layout.degree(n, size) for n in layers if layout.experts_in(n))
    return local * expert_size(run).on_rank(run.parallel.expert_tensor_size)


def _sharded(run: RunConfig, parameters: int, replicas: int) -> int:
    """Parameters whose optimizer state one rank keeps: a share, rounded up, with a distributed optimizer."""
    return -(-parameters // replicas) if run.parallel.use_distributed_optimizer else parameters


def _state_bytes(run: RunConfig) -> int:
    """Bytes of optimizer state for a parameter."""
    moments = 2 if run.optimizer.optimizer == "adam" else int(run.optimizer.sgd_momentum > 0)
    master = 0 if run.training.precision == "fp32" else 1
    return FP32_BYTES * (moments + master)
