"""The MoE layer: megatron-core's `MoELayer`, with its own expert count and, for PR-MoE, a dense MLP beside it.

Extends `megatron/core/transformer/moe/moe_layer.py:MoELayer`; the router comes from `moe/routers`.

Shape legend: S = sequence on this rank, B = batch, H = hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from torch import Tensor

from megatron_moe.config.base import ConfigError
from megatron_moe.moe.residual import ResidualMlp


@dataclass
class PyramidMoESubmodules(MoESubmodules):
    """Parts of a `PyramidMoELayer`."""

    residual: MLPSubmodules | None = None


class PyramidMoELayer(MoELayer):
    """Routed experts and, if the config asks for it, a residual MLP combined with them.

    `config` is the layer's own (`PyramidTransformerConfig.get_config_for_layer`): `num_moe_experts` is this layer's.
    """

    def __init__(
        self,
        config: Any,
        submodules: PyramidMoESubmodules,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        if config.num_moe_experts % config.expert_model_parallel_size:
            raise ConfigError(
                f"--num-experts {config.num_moe_experts}: must be a multiple of --expert-model-parallel-size "
                f"{config.expert_model_parallel_size}"
            )
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.residual: ResidualMlp | None = None
        if config.residual_mlp:
            assert submodules.residual is not None
            assert pg_collection is not None
            self.residual = ResidualMlp(config, submodules.residual, pg_collection)

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Experts, and the dense MLP beside them.

        Args:
            hidden_states: [S, B, H].
            intermediate_tensors: must be None (upstream's CUDA graphs).
            padding_mask: must be None.

        Returns:
            [S, B, H], and no bias.
        """
        routed_SBH, bias = super().forward(hidden_states, intermediate_tensors, padding_mask)
        if self.residual is None:
            return routed_SBH, bias
        return self.residual(hidden_states, routed_SBH), None


def moe_layers(model: torch.nn.Module) -> list[PyramidMoELayer]:
    """The MoE layers of this rank's part of a model, in order."""
    return [module for module in model.modules() if isinstance(module, PyramidMoELayer)]
