"""Which layer works out its own keys, values and attention weights, and what that needs of the other flags."""

from megatron_moe.config.base import ConfigError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.run import RunConfig


def source_layer(layer: int, share_factor: int) -> int:
    """The layer whose keys and values a layer uses: itself, or one before it. Both are counted from 1."""
    return layer - (layer - 1) % share_factor


def is_cross_layer(layer: int, share_factor: int) -> bool:
    """Whether a layer takes its keys and values from one before it."""
    return source_layer(layer, share_factor) != layer


def computed_share(model: ModelConfig) -> float:
    """Expected share of the layers that compute their attention weights in training: (1 + (K-1) p) / K where K, the
    span, divides the layers."""
    layers = model.num_layers
    always = -(-layers // (model.attention_weight_reuse_span or layers))
    return (always + (layers - always) * model.attention_weight_reuse_prob) / layers


def check_attention(run: RunConfig) -> None:
    """Check cross-layer attention and the reuse of attention weights against the rest of the run.

    Raises:
        ConfigError: they do not fit it.
    """
    _check_reuse(run)
    _check_sharing(run)


def _check_reuse(run: RunConfig) -> None:
    model = run.model
    prob, span = model.attention_weight_reuse_prob, model.attention_weight_reuse_span
    if prob == 1.0:
        if span is not None:
            raise ConfigError(
                f"--attention-weight-reuse-span {span}: needs --attention-weight-reuse-prob less than 1; at 1 every "
                "layer computes"
            )
        return
    flag = f"--attention-weight-reuse-prob {prob:g}"
    if span == 1:
        raise ConfigError("--attention-weight-reuse-span 1: must be at least 2; at 1 every layer computes")
    if model.transformer_impl != "local" or model.attention_backend != "sdpa":
        raise ConfigError(
            f"{flag}: needs --transformer-impl local and --attention-backend sdpa, whose attention hands its weights on"
        )
    if model.cla_share_factor > 1:
        raise ConfigError(
            f"{flag}: must be 1 with --cla-share-factor {model.cla_share_factor}; a layer shares keys or weights, "
            "not both"
        )
    held, what = _layers_together(run)
    if held < model.num_layers and (span is None or held % span):
        given = f"--attention-weight-reuse-span {span}" if span else flag
        raise ConfigError(
            f"{given}: weights are not sent between pipeline stages; --attention-weight-reuse-span must divide the "
            f"{held} layers of {what}"
        )


def _check_sharing(run: RunConfig) -> None:
    model = run.model
    factor = model.cla_share_factor
    if factor == 1:
        return
    flag = f"--cla-share-factor {factor}"
    if model.transformer_impl != "local":
        raise ConfigError(f"{flag}: needs --transformer-impl local")
    if factor > model.num_layers:
        raise ConfigError(f"{flag}: must be at most --num-layers {model.num_layers}")
    held, what = _layers_together(run)
    if held < model.num_layers and held % factor:
        raise ConfigError(
            f"{flag}: keys and values are not sent between pipeline stages; it must divide the {held} layers of {what}"
        )


def _layers_together(run: RunConfig) -> tuple[int, str]:
    """How many layers hand things on to each other, and what they are called."""
    stretch = run.parallel.num_layers_per_virtual_pipeline_stage
    if stretch is not None:
        return stretch, "a virtual pipeline stage"
    return run.model.num_layers // run.parallel.pipeline_model_parallel_size, "a pipeline stage"
