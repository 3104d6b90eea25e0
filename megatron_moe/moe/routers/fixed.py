"""Base of the routers whose assignment is a fixed table: no gate, no weight that depends on the token, no losses.

Shape legend: S = sequence on this rank, B = batch, H = hidden size, N = S * B tokens, E = experts of this layer,
V = token ids, K = experts of a token.
"""

from abc import abstractmethod
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_moe.config.base import UserError
from megatron_moe.moe.routers.base import CountingRouter, RouterStart
from megatron_moe.moe.token_map import draw_balanced, draw_uniform


class FixedMapRouter(CountingRouter):
    """Looks a token's experts up in `token_map`, a buffer that checkpoints hold.

    The map is drawn when a run starts (`start_run`) and never again: a resumed, resharded or scored model takes it
    from its checkpoint. Until then every entry is -1, which no lookup survives.

    Attributes:
        token_map: int32 [rows, K]; a subclass says what the rows are.
    """

    def __init__(
        self,
        config: Any,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.layer_number: int | None = None
        self.experts: int = config.num_moe_experts
        self.topk: int = config.moe_router_topk
        table = torch.full((self.rows(), self.topk), -1, dtype=torch.int32, device=torch.cuda.current_device())
        self.register_buffer("token_map", table)
        self.token_map: Tensor
        self.start_counting(self.experts)

    def set_layer_number(self, layer_number: int) -> None:
        """Tell the router which layer it is in, from 1 over the whole model; `MoELayer` does."""
        self.layer_number = layer_number

    @abstractmethod
    def rows(self) -> int:
        """Rows of the map."""

    @abstractmethod
    def draw(self, start: RouterStart) -> Tensor:
        """The map [rows, K]."""

    @abstractmethod
    def lookup(self) -> Tensor:
        """The experts [N, K] of the tokens at hand."""

    def start_run(self, start: RouterStart) -> None:
        """Draw the map.

        Raises:
            UserError: `--router-map balanced` without the counts it needs.
        """
        if self.token_map.is_meta:
            return
        self.token_map.copy_(self.draw(start))

    def draw_one(self, start: RouterStart, counts_V: Tensor | None, experts: int, *keys: int) -> Tensor:
        """A map [V, K] to `experts` experts, as --router-map says."""
        assert self.layer_number is not None
        keys = (start.seed, self.layer_number, *keys)
        if self.config.routing.router_map == "uniform":
            return draw_uniform(start.vocab_size, experts, *keys, topk=self.topk)
        if counts_V is None:
            raise UserError("--router-map balanced: needs --router-token-counts (tools/preprocess_data.py counts)")
        return draw_balanced(counts_V, experts, *keys, topk=self.topk)

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Assign.

        Args:
            hidden: [S, B, H]; only their number counts.
            padding_mask: must be None; sequences are packed.

        Returns:
            Weights [N, E], 1 / K each, and the map [N, E] (bool).
        """
        assert padding_mask is None
        assert self.inputs is not None
        experts_NK = self.lookup().long()
        map_NE = torch.zeros(experts_NK.shape[0], self.experts, dtype=torch.bool, device=hidden.device)
        map_NE = map_NE.scatter(1, experts_NK, True)
        self.count(map_NE)
        return map_NE.float() / self.topk, map_NE
