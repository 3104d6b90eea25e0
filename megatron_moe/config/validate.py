"""Checks of a whole run that need several sections, or the number of processes.

`validate` is called once, before anything is built. Each check raises `ConfigError`: one line with the flag,
its value and what would be right. What a section can check alone, it checks when it is made.
"""

from dataclasses import fields

from megatron_moe.config.attention import check_attention
from megatron_moe.config.base import ConfigError, flag_name, format_value, require
from megatron_moe.config.dispatch import check_dispatch
from megatron_moe.config.domain_placement import check_domain_groups
from megatron_moe.config.moe import check_expert_parallel, expert_degree
from megatron_moe.config.routing import check_domains, check_routing
from megatron_moe.config.run import RunConfig


def validate(run: RunConfig, world_size: int) -> None:
    """Check that a run's flags fit each other and `world_size` processes.

    Raises:
        ConfigError: they do not.
    """
    experts_per_layer = run.moe.experts_per_layer(run.model.num_layers)
    replicas = run.parallel.data_parallel_size(world_size)
    _check_tensor_parallel(run, experts_per_layer)
    _check_pipeline(run)
    check_attention(run)
    _check_sequence(run)
    _check_dense(run)
    check_routing(run.moe, run.routing)
    check_domains(run.moe, run.routing, run.model.num_domains, experts_per_layer)
    _check_use_of_domains(run)
    _check_map(run)
    _check_experts(run, experts_per_layer)
    check_domain_groups(run, experts_per_layer, replicas)
    check_dispatch(run, experts_per_layer, world_size)
    _check_backends(run, experts_per_layer)
    _check_routing_embedding(run)
    _check_optimizer(run)
    _check_batch(run, replicas)
    _check_duration(run, replicas)
    _check_recompute(run)


def _check_divides(divisor: int, name: str, value: int, of: str) -> None:
    """`divisor`, set by the field `name`, must divide `value`, which is what `of` says."""
    if value % divisor:
        raise ConfigError(f"{flag_name(name)} {divisor}: must divide {of} {value}")


def _check_tensor_parallel(run: RunConfig, experts_per_layer: tuple[int, ...]) -> None:
    model, size, name = run.model, run.parallel.tensor_model_parallel_size, "tensor_model_parallel_size"
    _check_divides(size, name, model.num_attention_heads, "--num-attention-heads")
    if model.query_groups % size:
        raise ConfigError(
            f"--tensor-model-parallel-size {size}: must divide --num-query-groups {model.query_groups}; "
            "key/value heads are split over the ranks, not copied"
        )
    if model.multi_latent_attention:
        if model.q_lora_rank is not None:
            _check_divides(size, name, model.q_lora_rank, "--q-lora-rank")
        width = model.kv_lora_rank + model.qk_pos_emb_head_dim
        _check_divides(size, name, width, "--kv-lora-rank + --qk-pos-emb-head-dim, which is")
    if 0 in experts_per_layer:
        _check_divides(size, name, model.ffn_size, "--ffn-hidden-size")
    if run.moe.mlp_type == "residual":
        _check_divides(size, name, run.expert_ffn_size, "the width of the residual MLP, --moe-ffn-hidden-size")
    shared = run.moe.moe_shared_expert_intermediate_size
    if shared is not None:
        _check_divides(size, name, shared, "--moe-shared-expert-intermediate-size")
    _check_divides(size, name, model.make_vocab_size_divisible_by, "--make-vocab-size-divisible-by")


def _check_pipeline(run: RunConfig) -> None:
    layers, stages = run.model.num_layers, run.parallel.pipeline_model_parallel_size
    _check_divides(stages, "pipeline_model_parallel_size", layers, "--num-layers")
    stretch = run.parallel.num_layers_per_virtual_pipeline_stage
    if stretch is not None and layers // stages % stretch:
        raise ConfigError(
            f"--num-layers-per-virtual-pipeline-stage {stretch}: must divide the {layers // stages} layers "
            f"of a stage (--num-layers {layers} / --pipeline-model-parallel-size {stages})"
        )


def _check_sequence(run: RunConfig) -> None:
    length, ranks = run.model.seq_length, run.parallel.context_parallel_size
    if ranks > 1 and length % (2 * ranks):
        raise ConfigError(
            f"--seq-length {length}: must be a multiple of 2 x --context-parallel-size {ranks} = {2 * ranks}"
        )
    tensor = run.parallel.tensor_model_parallel_size
    if run.uses_sequence_parallel and length // ranks % tensor:
        asked = run.parallel.sequence_parallel
        why = "--sequence-parallel splits" if asked else "experts under tensor parallelism split"
        raise ConfigError(
            f"--seq-length {length}: must be a multiple of --tensor-model-parallel-size {tensor} x "
            f"--context-parallel-size {ranks} = {tensor * ranks}, because {why} the sequence"
        )
    rotated = int(run.model.head_dim * run.model.rotary_percent)
    whole_heads = run.model.position_embedding_type == "rope" and not run.model.multi_latent_attention
    if whole_heads and (rotated % 2 or rotated == 0):
        raise ConfigError(
            f"--rotary-percent {run.model.rotary_percent}: must leave an even number of the "
            f"{run.model.head_dim} channels of a head to rotate, not {rotated}"
        )


def _check_experts(run: RunConfig, experts_per_layer: tuple[int, ...]) -> None:
    moe, parallel = run.moe, run.parallel
    check_expert_parallel(experts_per_layer, parallel.expert_model_parallel_size)
    if not any(experts_per_layer):
        if parallel.expert_tensor_parallel_size is not None:
            raise ConfigError(
                f"--expert-tensor-parallel-size {parallel.expert_tensor_parallel_size}: needs --num-experts"
            )
        return
    _check_divides(
        parallel.expert_tensor_size,
        "expert_tensor_parallel_size",
        run.expert_ffn_size,
        "the width of an expert, --moe-ffn-hidden-size",
    )
    if moe.moe_shared_expert_intermediate_size is not None and not run.model.disable_bias_linear:
        raise ConfigError(
            f"--moe-shared-expert-intermediate-size {moe.moe_shared_expert_intermediate_size}: needs "
            "--disable-bias-linear (megatron-core's shared experts have no biases)"
        )
    _check_router_groups(run, experts_per_layer)


def _check_router_groups(run: RunConfig, experts_per_layer: tuple[int, ...]) -> None:
    groups, chosen, topk = (
        run.moe.moe_router_num_groups,
        run.moe.moe_router_group_topk,
        run.moe.moe_router_topk,
    )
    if groups is None or chosen is None:
        return
    for number, count in enumerate(experts_per_layer, 1):
        if count % groups:
            raise ConfigError(
                f"--moe-router-num-groups {groups}: must divide the number of experts of every layer; layer "
                f"{number} has {count}"
            )
    require(chosen <= groups, "moe_router_group_topk", chosen, f"at most --moe-router-num-groups {groups}")
    _check_divides(chosen, "moe_router_group_topk", topk, "--moe-router-topk")
    smallest = min(count for count in experts_per_layer if count) // groups
    require(
        topk <= chosen * smallest,
        "moe_router_topk",
        topk,
        f"at most --moe-router-group-topk {chosen} x {smallest} experts of a group",
    )


def _check_dense(run: RunConfig) -> None:
    """Flags that have no meaning for this model may not be given: nothing is ignored."""
    if run.moe.num_experts is None:
        for field in fields(run.moe):
            value = getattr(run.moe, field.name)
            if value != field.default:
                raise ConfigError(f"{flag_name(field.name)} {format_value(value)}: needs --num-experts")
    if run.model.position_embedding_type != "rope":
        for name in ("rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor"):
            value = getattr(run.model, name)
            default = next(field.default for field in fields(run.model) if field.name == name)
            if value != default:
                raise ConfigError(f"{flag_name(name)} {value}: needs --position-embedding-type rope")


def _check_backends(run: RunConfig, experts_per_layer: tuple[int, ...]) -> None:
    parallel = run.parallel
    if parallel.context_parallel_size > 1 and run.model.attention_backend == "unfused":
        raise ConfigError(
            f"--attention-backend unfused: must be sdpa with --context-parallel-size {parallel.context_parallel_size}"
        )
    engine = run.model.transformer_impl == "transformer_engine"
    if (engine or run.expert_backend == "te") and parallel.expert_tensor_size > 1:
        # transformer_config.py: "Bias in Moe is only supported when ETP==1"; our own (moe/experts) count it once.
        whose = "--transformer-impl transformer_engine" if engine else "--moe-expert-backend te"
        require(
            run.moe.num_experts is None or run.model.disable_bias_linear,
            "expert_tensor_parallel_size",
            parallel.expert_tensor_size,
            f"1 for experts with biases under {whose} (or give --disable-bias-linear)",
        )
    if run.moe.moe_expert_dropout and run.expert_backend == "te":
        # Transformer Engine's grouped experts have no place for it.
        raise ConfigError(
            f"--moe-expert-dropout {run.moe.moe_expert_dropout}: needs --moe-expert-backend grouped or sequential"
        )
    if parallel.device == "cpu" and run.model.transformer_impl == "transformer_engine":
        raise ConfigError("--transformer-impl transformer_engine: needs a GPU; with --device cpu it is local")
    if parallel.device == "cpu" and run.moe.moe_expert_backend == "te":
        raise ConfigError("--moe-expert-backend te: needs a GPU; with --device cpu it is grouped or sequential")
    if parallel.device == "cpu" and run.moe.moe_token_dispatcher_type == "flex":
        raise ConfigError("--moe-token-dispatcher-type flex: needs a GPU; with --device cpu it is alltoall")
    if run.moe.moe_token_dispatcher_type == "flex" and parallel.expert_tensor_size == 1:
        # megatron/core/transformer/moe/token_dispatcher.py:MoEFlexTokenDispatcher.__init__
        size = parallel.expert_model_parallel_size
        alone = [
            number for number, count in enumerate(experts_per_layer, 1) if count and expert_degree(count, size) == 1
        ]
        require(
            not alone,
            "moe_token_dispatcher_type",
            "flex",
            f"alltoall or allgather where a rank has all experts of a layer, as of layer {', '.join(map(str, alone))}",
        )


def _check_use_of_domains(run: RunConfig) -> None:
    model = run.model
    if model.num_domains is not None and not model.domain_embedding and run.moe.router != "random-routed":
        raise ConfigError(f"--num-domains {model.num_domains}: needs --router random-routed or --domain-embedding")


def _check_map(run: RunConfig) -> None:
    """A map is drawn where a run starts; one that goes on has it in the checkpoint."""
    routing = run.routing
    if routing.router_map == "balanced" and routing.router_token_counts is None and run.checkpoint.load is None:
        raise ConfigError("--router-map balanced: needs --router-token-counts (tools/preprocess_data.py counts)")


def _check_routing_embedding(run: RunConfig) -> None:
    """Gradients of a shared one are complete after the last layer's backward pass, or on another stage's."""
    if run.shares_routing_embedding and run.parallel.overlap_grad_reduce:
        raise ConfigError(
            "--overlap-grad-reduce: cannot be combined with --router token-embedding, whose gradients come from all "
            "layers; leave it out, or give --no-router-embedding-shared"
        )


def _check_optimizer(run: RunConfig) -> None:
    # megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer.__init__
    if run.parallel.use_distributed_optimizer and run.optimizer.optimizer != "adam":
        raise ConfigError(f"--optimizer {run.optimizer.optimizer}: must be adam with --use-distributed-optimizer")
    for name in ("expert_lr_scale", "expert_adam_eps"):
        value = getattr(run.optimizer, name)
        if value is not None and run.moe.num_experts is None:
            raise ConfigError(f"{flag_name(name)} {value}: needs --num-experts")


def _check_batch(run: RunConfig, replicas: int) -> None:
    training, stages = run.training, run.parallel.pipeline_model_parallel_size
    per_pass = training.micro_batch_size * replicas
    passes = [training.micro_batches(replicas)]
    if training.rampup_batch_size is not None:
        start, increment, _ = training.rampup_batch_size
        target = training.batch_size(replicas)
        legal = (
            f"START and INCREMENT that are multiples of --micro-batch-size {training.micro_batch_size} x "
            f"data-parallel size {replicas} = {per_pass}, with steps of INCREMENT leading from START to "
            f"--global-batch-size {target}"
        )
        valid = start >= 1 and increment >= 1 and start % per_pass == 0 and increment % per_pass == 0
        valid = valid and start <= target and (target - start) % increment == 0
        require(valid, "rampup_batch_size", training.rampup_batch_size, legal)
        passes += [size // per_pass for size in range(start, target, increment)]
    if run.parallel.num_layers_per_virtual_pipeline_stage is None:
        return
    # megatron/core/pipeline_parallel/schedules.py:forward_backward_pipelining_with_interleaving
    for count in passes:
        if count % stages:
            raise ConfigError(
                f"--global-batch-size {count * per_pass}: makes {count} micro-batches; an interleaved "
                f"pipeline needs a multiple of --pipeline-model-parallel-size {stages}"
            )


def _check_duration(run: RunConfig, replicas: int) -> None:
    training, optimizer = run.training, run.optimizer
    if training.train_iters is None and training.train_tokens is None:
        raise ConfigError("--train-iters: is required (or --train-tokens)")
    tokens_per_step = training.batch_size(replicas) * run.model.seq_length
    limits = []
    if training.train_iters is not None:
        limits.append(training.train_iters)
    if training.train_tokens is not None:
        # With a ramp-up there are more steps than this, never fewer.
        limits.append(-(-training.train_tokens // tokens_per_step))
    decay = optimizer.lr_decay_iters or min(limits)
    source = "--lr-decay-iters" if optimizer.lr_decay_iters else "the training steps,"
    require(
        optimizer.lr_warmup_iters < decay,
        "lr_warmup_iters",
        optimizer.lr_warmup_iters,
        f"less than {source} {decay}",
    )
    if optimizer.lr_decay_style == "WSD" and optimizer.lr_wsd_decay_iters is not None:
        wsd = optimizer.lr_wsd_decay_iters
        require(wsd <= decay, "lr_wsd_decay_iters", wsd, f"at most {source} {decay}")


def _check_recompute(run: RunConfig) -> None:
    training = run.training
    stretch = run.parallel.num_layers_per_virtual_pipeline_stage
    held = stretch or run.model.num_layers // run.parallel.pipeline_model_parallel_size
    layers = training.recompute_num_layers
    require(
        layers is None or layers <= held,
        "recompute_num_layers",
        layers,
        f"at most {held}, the layers of a {'virtual ' if stretch else ''}pipeline stage",
    )
    modules = training.recompute_modules or ()
    if "moe" in modules and run.moe.num_experts is None:
        raise ConfigError("--recompute-modules moe: needs --num-experts")
    if "shared_experts" in modules and run.moe.moe_shared_expert_intermediate_size is None:
        raise ConfigError("--recompute-modules shared_experts: needs --moe-shared-expert-intermediate-size")
    # tensor_parallel/random.py:CheckpointWithoutOutput uses Transformer Engine's FP8 state without asking.
    for module in ("moe_act", "layernorm"):
        if module in modules and run.model.transformer_impl != "transformer_engine":
            raise ConfigError(f"--recompute-modules {module}: needs --transformer-impl transformer_engine")
