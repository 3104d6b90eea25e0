"""Large-margin router of Alibaba PAI's GPT-MoE: top-k routing whose training asks for a margin at a target expert.

The mathematics and its sources are in `moe/margins.py`. The code that PAI released has five defects which are not
reproduced here:
1. its margin is fixed at 1, with which L-Softmax is the identity: its margin router is the plain one;
2. the norm of the target's weight is taken over the wrong axis, which only margin 1 hides;
3. beta is an attribute of the module: not in the checkpoint, and it decays twice a step under activation recompute.
   Here it is a buffer that follows the run's step;
4. a margin of 2 or more from the first step on flips every decision of a fresh router, whose cosines are near 0: beta
   starts at 100, in the code as here, but there nothing keeps it from starting again at a resume;
5. the published scripts ask for a linear layer called `normal`, which their code does not know.

Shape legend: S = sequence on this rank, B = batch, N = S * B tokens, E = experts of this layer, H = hidden size.
"""

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_moe.moe import margins
from megatron_moe.moe.assignment import balanced_assignment
from megatron_moe.moe.micro_batch import WholeMicroBatch
from megatron_moe.moe.routers.topk import TopKRouter


class LargeMarginRouter(TopKRouter):
    """Top-k with a margin in training, and without one outside of it.

    `lsoftmax` and `additive` lower the target's logit in the choice of experts and in the balancing loss. The experts'
    outputs are weighed by the plain scores, the same as in evaluation, unless --router-margin-gate is given (PAI's
    code). The z-loss is of the plain logits. `elsayed` leaves the logits alone and adds a loss.

    With several experts a token the target `self` is the first of them, the one with the largest logit.

    With --router-margin-scale the logits are cosines times that scale, in evaluation too.
    """

    fp32_buffers = (*TopKRouter.fp32_buffers, "margin_beta")
    margin_beta: Tensor
    """[1], fp32, in the checkpoint."""

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self._routing = self.config.routing
        beta = torch.full((1,), self._beta(0), dtype=torch.float32, device=torch.cuda.current_device())
        self.register_buffer("margin_beta", beta)
        self._input_length_N: Tensor | None = None

    def begin_step(self, step: int) -> None:
        """The margin of the step: the same in every pass over its micro-batches."""
        super().begin_step(step)
        self.margin_beta.fill_(self._beta(step))

    def gating(self, input: Tensor) -> Tensor:
        """Logits [S, B, E] of the input [S, B, H], whose length is remembered for the margin."""
        logits = super().gating(input)
        scale = self._routing.router_margin_scale
        if scale is None and not self.training:
            return logits
        length_SB = torch.linalg.vector_norm(input, dim=-1, dtype=logits.dtype)
        if scale is not None:
            return scale * logits / (length_SB[..., None] * self._weight_length(logits) + margins.EPSILON)
        self._input_length_N = length_SB.view(-1)
        return logits

    def scored(self, logits_NE: Tensor, batch: int) -> Tensor:
        """The logits, in training with the target's lowered; or with the margin loss attached."""
        input_length_N, self._input_length_N = self._input_length_N, None
        if not self.training or not self._routing.has_margin:
            return logits_NE
        target_N = self._target(logits_NE.detach(), batch)
        if self._routing.router_margin_type == "elsayed":
            return self._attach_margin_loss(logits_NE, target_N)
        plain_N = logits_NE.gather(1, target_N[:, None]).squeeze(1)
        length_N: Tensor | float
        if self._routing.router_margin_scale is not None:
            length_N = self._routing.router_margin_scale
        else:
            assert input_length_N is not None
            length_N = input_length_N * self._weight_length(logits_NE)[target_N]
        if self._routing.router_margin_type == "lsoftmax":
            assert isinstance(length_N, Tensor)
            margined_N = margins.lsoftmax(plain_N, length_N, int(self._routing.margin), self.margin_beta)
        else:
            margined_N = margins.additive(plain_N, length_N, self._routing.margin)
        return logits_NE.scatter(1, target_N[:, None], margined_N[:, None])

    def weighed(self, logits_NE: Tensor, scored_NE: Tensor) -> Tensor:
        """The plain logits, or those with the margin."""
        return scored_NE if self._routing.router_margin_gate else logits_NE

    def _beta(self, step: int) -> float:
        flags = self._routing
        return margins.beta_at(
            step, flags.router_margin_beta, flags.router_margin_beta_decay, flags.router_margin_beta_min
        )

    def _weight_length(self, like: Tensor) -> Tensor:
        """|w| [E] of every expert."""
        return torch.linalg.vector_norm(self.weight, dim=1, dtype=like.dtype)

    @torch.no_grad()
    def _target(self, logits_NE: Tensor, batch: int) -> Tensor:
        """The expert [N] whose logit gets the margin."""
        kind = self._routing.margin_target
        if kind == "self":
            return logits_NE.argmax(dim=1)
        if kind == "balanced":
            whole = WholeMicroBatch.of(self)
            return whole.mine(balanced_assignment(whole.gather(logits_NE)))
        inputs, shape = self._known_inputs(), (-1, batch)
        group = self.tp_cp_group if self.config.sequence_parallel else self.cp_group
        return margins.round_robin(
            inputs.sample.view(shape), inputs.place.view(shape), logits_NE.shape[1], group.size()
        )

    def _attach_margin_loss(self, logits_NE: Tensor, target_N: Tensor) -> Tensor:
        """The logits, whose gradient also holds that of the margin loss.

        The step's gradients are divided by its number of tokens in the end, so a sum over tokens is attached: a mean
        over the step whatever its layout and accumulation (upstream: `TopKRouter.apply_z_loss`).
        """
        coefficient = self._routing.router_margin_loss_coeff
        if not torch.is_grad_enabled():
            return logits_NE
        assert self.calculate_per_token_loss
        loss_N = margins.boundary_loss(logits_NE, self.weight, target_N, self._routing.margin)
        get_moe_metrics_tracker().record(
            "margin_loss", loss_N.mean(), self.layer_number, self.config.num_layers, avg_group=self.tp_dp_cp_group
        )
        return MoEAuxLossAutoScaler.apply(logits_NE, coefficient * loss_N.sum())
