"""Word-embedding routing (HunYuan 1T): the gate sees a routing embedding of the token id, not the hidden state.

`z = R[token id] W`, with the weights, losses, bias and capacity of `topk`. With R shared by all layers, and W by all
layers of as many experts (the default), a token id goes to the same experts in each of them, in every context; an
expert bias, which layers learn by themselves, can change that.

Shape legend: S = sequence on this rank, B = batch, H = hidden size, N = S * B tokens, E = experts of this layer.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_moe.moe.routers.topk import TopKRouter
from megatron_moe.moe.routing_embedding import RoutingEmbedding

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


class TokenEmbeddingRouter(TopKRouter):
    """Top-k over logits of the token id."""

    def __init__(
        self,
        config: Any,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer)
        # Upstream's gate on the hidden state.
        del self.weight
        self.register_parameter("weight", None)
        self.own: RoutingEmbedding | None = None
        if not config.routing.router_embedding_shared:
            self.own = RoutingEmbedding(config, [config.num_moe_experts])
        self._shared: list[RoutingEmbedding] = []

    def share(self, embedding: RoutingEmbedding) -> None:
        """Use the model's embedding; it stays the model's part, and does not become this module's."""
        self._shared = [embedding]

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S, B, E].

        Args:
            input: [S, B, H], which has no influence.
        """
        assert self.inputs is not None
        embedding = self.own or self._shared[0]
        experts = self.config.num_moe_experts
        logits_NE = embedding.logits(self.inputs.token, experts, _DTYPES[self.config.moe_router_dtype])
        return logits_NE.view(*input.shape[:2], experts)
