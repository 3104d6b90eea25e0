"""Top-k router: megatron-core's, without a bias on its logits, and counting what each expert receives.

Extends `megatron/core/transformer/moe/router.py:TopKRouter`.

Shape legend: S = sequence on this rank, B = batch, N = S * B tokens, E = experts of this layer, H = hidden size.
"""

import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter as MegatronTopKRouter
from torch import Tensor

from megatron_moe.moe.routers.base import CountingRouter


class TopKRouter(CountingRouter, MegatronTopKRouter):
    """Top-k routing with megatron-core's scores, losses, expert bias and capacity.

    Upstream gives the router's linear layer a bias whenever the other layers have one; the GPT-MoE and PR-MoE
    models have none (moe_systems: `E * h` parameters), so it is left out here.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        router_config = copy.copy(config)
        router_config.add_bias_linear = False
        self._capacity_by_position: float | None = None
        if config.moe_token_drop_policy == "position":
            self._capacity_by_position = config.moe_expert_capacity_factor
            router_config.moe_expert_capacity_factor = None
        super().__init__(config=router_config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        assert config.num_moe_experts is not None
        self.start_counting(config.num_moe_experts)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route.

        Args:
            logits: [S, B, E].
            padding_mask: must be None; sequences are packed.

        Returns:
            Weights [N, E] and the routing map [N, E] (bool).
        """
        probs_NE, map_NE = super().routing(logits, padding_mask)
        if self._capacity_by_position is not None:
            map_NE = self._keep_first(map_NE)
            probs_NE = probs_NE * map_NE
        padded = self.config.moe_pad_expert_input_to_capacity
        kept_NE = map_NE & (probs_NE.detach() > 0) if padded else map_NE
        self.count(kept_NE, dropped=map_NE.shape[0] * self.topk - kept_NE.sum())
        return probs_NE, map_NE

    @torch.no_grad()
    def _keep_first(self, map_NE: Tensor) -> Tensor:
        """The map without what comes after an expert is full, padded if asked for.

        Upstream's own `position` policy takes the top k of a column of zeros and ones: which of the equal ones that
        keeps is up to the kernel (`moe_utils.py:apply_router_token_dropping`).
        """
        places_N = torch.arange(map_NE.shape[0], 0, -1, device=map_NE.device)
        order_NE = (places_N[:, None] + map_NE * map_NE.shape[0]).float()
        _, kept_NE = apply_router_token_dropping(
            order_NE,
            map_NE,
            self.topk,
            self._capacity_by_position,
            "probs",
            self.config.moe_pad_expert_input_to_capacity,
        )
        return kept_NE

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, aux_loss_name: str, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Upstream's, with the gradient of the global loss made independent of the number of replicas.

        The global loss of a replica is its share of a sum over all of them, yet upstream averages gradients over
        replicas as it does for the per-replica loss, which is a mean: with D replicas the coefficient would count for
        1/D of what it does in one process.
        """
        if aux_loss_name == "global_load_balancing_loss":
            replicas = self.tp_dp_cp_group.size() // self.tp_cp_group.size()
            aux_loss = aux_loss + (aux_loss - aux_loss.detach()) * (replicas - 1)
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, aux_loss_name, *args, **kwargs
        )
