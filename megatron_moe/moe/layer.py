"""The MoE layer: megatron-core's `MoELayer`, with its own expert count and, for PR-MoE, a dense MLP beside it.

Extends `megatron/core/transformer/moe/moe_layer.py:MoELayer`; the router comes from `moe/routers`.

Shape legend: S = sequence on this rank, B = batch, H = hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from megatron_moe.moe.dispatch.choose import replace_dispatcher
from megatron_moe.moe.expert_parallel import layer_groups, mark_copies
from megatron_moe.moe.expert_residual import ExpertResidual, ExpertResidualSubmodules
from megatron_moe.moe.inputs import unpack_inputs
from megatron_moe.moe.residual import ResidualMlp


@dataclass
class PyramidMoESubmodules(MoESubmodules):
    """Parts of a `PyramidMoELayer`."""

    residual: MLPSubmodules | None = None
    expert_residual: ExpertResidualSubmodules | None = None


class PyramidMoELayer(MoELayer):
    """Routed experts and, if the config asks for it, a residual MLP combined with them.

    `config` is the layer's own (`PyramidTransformerConfig.get_config_for_layer`): `num_moe_experts` is this layer's.

    Attributes:
        copies: ranks that hold copies of the same experts, or None (`moe/expert_parallel.py`).
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
        pg_collection, copies = layer_groups(config, pg_collection or get_default_pg_collection())
        super().__init__(config, submodules, layer_number, pg_collection, is_mtp_layer, name)
        self.copies = copies
        mark_copies(self.experts, copies)
        assert not self.shared_expert_overlap
        self.token_dispatcher: MoETokenDispatcher = replace_dispatcher(self.token_dispatcher, config, pg_collection)
        self.residual: ResidualMlp | None = None
        if config.residual_mlp:
            assert submodules.residual is not None
            self.residual = ResidualMlp(config, submodules.residual, pg_collection)
        self.expert_residual: ExpertResidual | None = None
        if config.moe.use_expert_residual_network:
            assert submodules.expert_residual is not None
            self.expert_residual = ExpertResidual(config, submodules.expert_residual, pg_collection)
        self._weights_NE: Tensor | None = None
        # Done here, with the routing inputs as an argument of their own: upstream's would take them for a mask.
        self._recompute = bool(self.moe_layer_recompute)
        self.moe_layer_recompute: bool = False

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Experts, and the dense MLP beside them.

        Args:
            hidden_states: [S, B, H].
            intermediate_tensors: must be None (upstream's CUDA graphs).
            padding_mask: what routers know of the tokens, [B, S, K] of `moe/inputs.py`, or None. Sequences are packed:
                there is no padding.

        Returns:
            [S, B, H], and no bias.
        """
        assert intermediate_tensors is None
        if self._recompute and self.training:
            return tensor_parallel.checkpoint(self._forward, False, hidden_states, padding_mask), None
        return self._forward(hidden_states, padding_mask), None

    def _forward(self, hidden_SBH: Tensor, inputs_BSK: Tensor | None) -> Tensor:
        self.router.inputs = None if inputs_BSK is None else unpack_inputs(inputs_BSK)
        routed_SBH, bias = super().forward(hidden_SBH)
        self.router.inputs = None
        assert bias is None
        return routed_SBH if self.residual is None else self.residual(hidden_SBH, routed_SBH)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routing weights and map, both [N, E]; the expert residual network needs the weights after the experts."""
        weights_NE, map_NE = super().route(hidden_states, padding_mask)
        if self.expert_residual is not None:
            self._weights_NE = weights_NE
        return weights_NE, map_NE

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """What upstream does with the combined output [S, B, H]; shared experts are added behind the network."""
        if self.expert_residual is None:
            return super().postprocess(output, shared_expert_output)
        weights_NE, self._weights_NE = self._weights_NE, None
        assert weights_NE is not None
        mixed = self.expert_residual(super().postprocess(output, None), weights_NE)
        return mixed if shared_expert_output is None else mixed + shared_expert_output


def moe_layers(model: torch.nn.Module) -> list[PyramidMoELayer]:
    """The MoE layers of this rank's part of a model, in order."""
    return [module for module in model.modules() if isinstance(module, PyramidMoELayer)]
