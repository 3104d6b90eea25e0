"""What --dry-run prints: a run's model, its parameters, the layout, the memory per rank and the batch.

No torch here; everything is arithmetic on the flags.
"""

from collections.abc import Sequence

from megatron_moe.config.attention import computed_share
from megatron_moe.config.run import RunConfig
from megatron_moe.config.validate import validate
from megatron_moe.model.kv_cache import kv_cache_bytes_per_token
from megatron_moe.model.parameters import BuiltCounts, count_parameters, stage_memory
from megatron_moe.moe.layout import expert_layout

GIB = 2**30


def report(run: RunConfig, world_size: int, built: BuiltCounts | None = None) -> str:
    """Everything that can be known of a run before it starts, for a person to read.

    Args:
        run: the resolved flags, with --vocab-size.
        world_size: number of processes to assume.
        built: counts read off the model that the run would build.

    Raises:
        ConfigError: the run is not valid on that many processes.
        RuntimeError: the model built has other counts than the formula.
    """
    validate(run, world_size)
    parts = [
        ("Model", _model(run)),
        ("Parameters", _parameters(run) + _check(run, built)),
        ("Layout", _layout(run, world_size)),
        ("Memory of a rank, in GiB, without activations", _memory(run, world_size)),
        ("Batch", _batch(run, world_size)),
    ]
    return "\n\n".join("\n".join([title, *(f"  {line}" for line in lines)]) for title, lines in parts)


def _model(run: RunConfig) -> list[str]:
    model, moe = run.model, run.moe
    layout = expert_layout(run)
    activation = "SwiGLU" if model.swiglu else "squared ReLU" if model.squared_relu else "GELU"
    activation += " by tanh" if model.gelu_tanh else ""
    positions = model.position_embedding_type + (
        f" (scaled by {model.rope_scaling_factor:g})" if model.use_rope_scaling else ""
    )
    if model.rotary_scaling_factor is not None:
        positions += f" (YaRN, scaled by {model.rotary_scaling_factor:g})"
    biases = "no biases" if model.disable_bias_linear else "biases"
    tied = "untied" if model.untie_embeddings_and_output_weights else "tied"
    lines = [
        f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} attention heads "
        f"of {model.head_dim}, {model.query_groups} key/value heads, sequence {model.seq_length}",
        f"{positions} positions, {model.normalization}, {activation}, {biases}, {tied} embeddings",
    ]
    if model.multi_latent_attention:
        rank = "" if model.q_lora_rank is None else f", of queries {model.q_lora_rank}"
        lines.append(
            f"multi-latent attention: latent of keys and values {model.kv_lora_rank}{rank}; heads of "
            f"{model.qk_head_dim} + {model.qk_pos_emb_head_dim} rotated channels, values of {model.v_head_dim}"
        )
    if model.cla_share_factor > 1:
        lines.append(f"cross-layer attention: {model.cla_share_factor} layers share keys and values")
    if model.attention_weight_reuse_prob < 1.0:
        lines.append(
            f"attention weights: a layer computes its own with probability {model.attention_weight_reuse_prob:g}, in "
            f"training {computed_share(model):.1%} of the layers do; the others use those of the layer before"
        )
    lines.append(f"KV cache per token: {kv_cache_bytes_per_token(run):,} bytes in {run.training.precision}")
    if layout.num_moe_layers < model.num_layers:
        lines.append(f"dense layers: {model.num_layers - layout.num_moe_layers}, MLP width {model.ffn_size}")
    if layout.num_moe_layers:
        lines += [
            f"MoE layers: {layout.num_moe_layers}, expert width {run.expert_ffn_size}, {_routing(run)}",
            f"experts of layer {layout.describe()}",
        ]
    if moe.mlp_type == "residual":
        lines.append(f"residual MLP beside the experts, combined by {moe.residual_combine}")
    if moe.use_expert_residual_network:
        lines.append(f"expert residual network of {moe.expert_residual_layers} blocks after the experts")
    if moe.moe_shared_expert_intermediate_size is not None:
        lines.append(f"shared expert beside the experts, width {moe.moe_shared_expert_intermediate_size}")
    return lines


def _routing(run: RunConfig) -> str:
    moe = run.moe
    factor = moe.moe_expert_capacity_factor
    capacity = "dropless" if factor is None else f"capacity factor {factor:g}"
    return f"router {moe.router} with {moe.moe_router_topk} of them per token, {capacity}"


def _parameters(run: RunConfig) -> list[str]:
    built = count_parameters(run, padded_vocab=True)
    published = count_parameters(run)
    rows = [
        (name.replace("_", " "), built.components()[name], published.components()[name]) for name in built.components()
    ]
    rows = [row for row in rows if row[1]]
    sums = [
        ("total", built.total, published.total),
        ("activated per token", built.activated, published.activated),
        ("non-expert", built.non_expert, published.non_expert),
    ]
    cells = [[name, _count(first), _count(second)] for name, first, second in rows + sums]
    header = [
        "",
        f"built (vocabulary {run.model.padded_vocab_size})",
        f"published (vocabulary {run.model.vocab_size})",
    ]
    lines = _table([header, *cells])
    lines.insert(1 + len(rows), "-" * len(lines[0]))
    return lines


def _check(run: RunConfig, built: BuiltCounts | None) -> list[str]:
    if built is None:
        return []
    expected = count_parameters(run, padded_vocab=True)
    for name in ("total", "experts", "router"):
        if getattr(built, name) != getattr(expected, name):
            raise RuntimeError(
                f"{name}: the model built has {getattr(built, name)}, expected {getattr(expected, name)}"
            )
    return [f"the model built on the meta device has {built.total:,}, of which {built.non_expert:,} non-expert"]


def _layout(run: RunConfig, world_size: int) -> list[str]:
    parallel = run.parallel
    expert_ranks = parallel.expert_tensor_size * parallel.expert_model_parallel_size
    expert_replicas = world_size // (expert_ranks * parallel.pipeline_model_parallel_size)
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "CP": parallel.context_parallel_size,
        "DP": parallel.data_parallel_size(world_size),
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_size,
        "expert DP": expert_replicas,
    }
    switches = {
        "sequence parallel": run.uses_sequence_parallel,
        "distributed optimizer": parallel.use_distributed_optimizer,
        "interleaved pipeline": parallel.num_layers_per_virtual_pipeline_stage is not None,
    }
    on = [name for name, value in switches.items() if value]
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items())
    lines = [f"{_plural(world_size, 'process', 'processes')}: {layout}", *([", ".join(on)] if on else [])]
    size = parallel.expert_model_parallel_size
    if size > 1:
        lines.append(f"on each rank of layer {expert_layout(run).describe_spread(size)}")
    return lines


def _memory(run: RunConfig, world_size: int) -> list[str]:
    header = ["stage", "layers", "parameters", "weights", "gradients", "optimizer", "sum"]
    cells = [
        [
            str(stage.stage),
            _ranges(stage.layers),
            _count(stage.parameters),
            *(
                f"{size / GIB:.3f}"
                for size in (
                    stage.weight_bytes,
                    stage.gradient_bytes,
                    stage.optimizer_bytes,
                    stage.total_bytes,
                )
            ),
        ]
        for stage in stage_memory(run, world_size)
    ]
    precision = f"{run.training.precision} weights, fp32 gradients, {run.optimizer.optimizer} state in fp32"
    return [precision, *_table([header, *cells])]


def _batch(run: RunConfig, world_size: int) -> list[str]:
    training = run.training
    replicas = run.parallel.data_parallel_size(world_size)
    samples = training.batch_size(replicas)
    micro = training.micro_batches(replicas)
    lines = [
        f"{_plural(samples, 'sample', 'samples')} a step = {_plural(micro, 'micro-batch', 'micro-batches')} "
        f"of {training.micro_batch_size} on {_plural(replicas, 'replica', 'replicas')}; "
        f"{samples * run.model.seq_length:,} tokens"
    ]
    if training.rampup_batch_size is not None:
        start, increment, over = training.rampup_batch_size
        lines.append(f"rising from {start} in steps of {increment} over {over:,} samples")
    limits = []
    if training.train_iters is not None:
        limits.append(f"{training.train_iters:,} steps")
    if training.train_tokens is not None:
        limits.append(f"{training.train_tokens:,} tokens")
    return [*lines, f"until {' or '.join(limits)}{', whichever comes first' if len(limits) > 1 else ''}"]


def _count(number: int) -> str:
    """`16,353,083,416 (16.353 B)`; plain below a million."""
    if number >= 10**9:
        return f"{number:,} ({number / 10**9:.3f} B)"
    if number >= 10**6:
        return f"{number:,} ({number / 10**6:.2f} M)"
    return f"{number:,}"


def _plural(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _ranges(numbers: Sequence[int]) -> str:
    """Consecutive numbers as stretches: `1-6,13-18`."""
    stretches: list[list[int]] = []
    for number in numbers:
        if stretches and number == stretches[-1][-1] + 1:
            stretches[-1].append(number)
        else:
            stretches.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in stretches)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
