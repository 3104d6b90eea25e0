"""Experts of an MoE layer: what computes them, by the name that `--moe-expert-backend` gives.

All have upstream's interface (`megatron/core/transformer/moe/moe_layer.py:ExpertsBuilder`), give equal results and
write the same checkpoints.
"""

from megatron.core.transformer.moe.moe_layer import ExpertsBuilder

from megatron_moe.config.base import ConfigError
from megatron_moe.moe.experts.grouped import grouped_experts
from megatron_moe.moe.experts.sequential import sequential_experts


def expert_builder(backend: str) -> ExpertsBuilder:
    """Builder of a layer's experts.

    Args:
        backend: `RunConfig.expert_backend`.

    Raises:
        ConfigError: Transformer Engine was asked for and is not installed.
    """
    if backend == "te":
        return _te_experts()
    return grouped_experts() if backend == "grouped" else sequential_experts()


def _te_experts() -> ExpertsBuilder:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise ConfigError(
            "--moe-expert-backend te: Transformer Engine is not installed; pip install 'megatron_moe[te]' on a machine "
            "with CUDA, or use --moe-expert-backend grouped"
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider().grouped_mlp_modules(True)
