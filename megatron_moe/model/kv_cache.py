"""How much memory keys and values take while text is generated, from the flags alone. No torch here."""

from megatron_moe.config.attention import is_cross_layer
from megatron_moe.config.run import RunConfig

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def kv_cache_bytes_per_token(run: RunConfig) -> int:
    """Bytes of all layers' keys and values of one token, on all ranks together.

    A layer that uses another one's keys and values keeps none. Tensor-parallel ranks share the key/value heads out,
    pipeline stages the layers.
    """
    model = run.model
    layers = sum(not is_cross_layer(number, model.cla_share_factor) for number in range(1, model.num_layers + 1))
    return layers * model.query_groups * (model.head_dim + model.value_dim) * BYTES[run.training.precision]
