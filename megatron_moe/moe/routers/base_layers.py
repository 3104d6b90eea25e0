"""BASE layers' router (Lewis et al. 2021, BASE Layers: Simplifying Training of Large, Sparse Models).

A token's score for an expert is the product of its hidden state with the expert's embedding, the row of the gate. In
training the tokens of a micro-batch are assigned so that every expert gets an equal share of them and the sum of the
scores is largest (`moe/assignment.py`); elsewhere each goes to the expert of its largest score. The expert's output is
weighed by the sigmoid of the score, through which alone the gate learns. No auxiliary loss, no capacity, top-1.

Shape legend: S = sequence on this rank, B = batch, N = S * B tokens of this rank, M = tokens of the micro-batch, E =
experts of this layer.
"""

import torch
from torch import Tensor

from megatron_moe.moe.assignment import balanced_assignment
from megatron_moe.moe.micro_batch import WholeMicroBatch
from megatron_moe.moe.routers.topk import TopKRouter


class BaseLayersRouter(TopKRouter):
    """Balanced assignment in training, greedy elsewhere.

    The paper assigns the tokens that all workers exchange at random; here it is the tokens of one micro-batch, which
    no layout changes. A training step sees all its tokens, later ones too; the greedy rule sees one.
    """

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route.

        Args:
            logits: [S, B, E], the scores.
            padding_mask: must be None; sequences are packed.

        Returns:
            Weights [N, E] and the routing map [N, E] (bool), one expert for each token.
        """
        assert padding_mask is None
        score_NE = logits.view(-1, logits.shape[-1])
        map_NE = torch.zeros_like(score_NE, dtype=torch.bool).scatter(1, self._experts(score_NE)[:, None], True)
        self.count(map_NE)
        return torch.sigmoid(score_NE) * map_NE, map_NE

    @torch.no_grad()
    def _experts(self, score_NE: Tensor) -> Tensor:
        """The expert [N] of every token."""
        if not self.training:
            return score_NE.argmax(dim=1)
        whole = WholeMicroBatch.of(self)
        return whole.mine(balanced_assignment(whole.gather(score_NE)))
