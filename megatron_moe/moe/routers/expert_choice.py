"""Expert choice (Zhou et al. 2022, Mixture-of-Experts with Expert Choice Routing): experts take tokens.

In training every expert takes the C tokens of a micro-batch that are most probable for it, with C = ceil(M * k / E): a
token is worked on by k = --moe-router-topk experts on average, by any number of them and perhaps by none. The load is
balanced by construction, so there is no auxiliary loss; an output's weight is the probability, a softmax over experts.

Training sees the future: whether an expert takes a token depends on the tokens it competes with, later ones of the same
text among them. A trained choice cannot be repeated when text is generated, nor can a validation loss that used it be
believed. Outside of training an expert therefore takes each token by itself: if its probability is at least the
expert's cutoff, which is the running mean of the lowest probability that the expert took in training. The tokens per
expert then vary, and the loss is a little higher than that of training.

Shape legend: S = sequence on this rank, B = batch, N = S * B tokens of this rank, M = tokens of the micro-batch, E =
experts of this layer, C = tokens that an expert takes.
"""

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_moe.moe.capacity import expert_capacity
from megatron_moe.moe.micro_batch import WholeMicroBatch
from megatron_moe.moe.routers.topk import TopKRouter


class ExpertChoiceRouter(TopKRouter):
    """Experts choose tokens: the best of the micro-batch in training, those above a cutoff elsewhere.

    Dropped in the load counters are tokens that no expert took.

    Attributes:
        cutoffs: [E] fp32, in the checkpoint; 1 / E before the first step.
        cutoff_steps: [1] how many steps the cutoffs are a mean of, in the checkpoint. Until there are 1 / (1 - decay)
            it is their plain mean, so that it does not lean towards where it began.
    """

    # A hundredth of a change must count.
    fp32_buffers = (*TopKRouter.fp32_buffers, "cutoffs", "cutoff_sums")
    cutoffs: Tensor
    cutoff_steps: Tensor
    cutoff_sums: Tensor

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config, pg_collection, is_mtp_layer)
        experts = self.config.num_moe_experts
        assert experts is not None
        device = torch.cuda.current_device()
        self.register_buffer("cutoffs", torch.full((experts,), 1.0 / experts, device=device))
        self.register_buffer("cutoff_steps", torch.zeros(1, dtype=torch.int64, device=device))
        # Of this step: lowest probabilities taken, summed over micro-batches, and how many micro-batches.
        self.register_buffer("cutoff_sums", torch.zeros(experts + 1, device=device), persistent=False)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route.

        Args:
            logits: [S, B, E].
            padding_mask: must be None; sequences are packed.

        Returns:
            Weights [N, E] and the routing map [N, E] (bool), any number of experts for each token.
        """
        assert padding_mask is None
        logits_NE = self.apply_z_loss(logits.view(-1, logits.shape[-1]))
        probs_NE = torch.softmax(logits_NE, dim=1)
        # Under recompute the first pass has no gradients: each micro-batch is taken in once.
        learns = torch.is_grad_enabled()
        map_NE = self._chosen(probs_NE, learns) if self.training else probs_NE >= self.cutoffs
        self.count(map_NE, dropped=(~map_NE.any(dim=1)).sum())
        return probs_NE * map_NE, map_NE

    @torch.no_grad()
    def _chosen(self, probs_NE: Tensor, learns: bool) -> Tensor:
        """The map [N, E] of the tokens that experts take from the micro-batch; notes the cutoffs if it `learns`."""
        whole = WholeMicroBatch.of(self)
        probs_ME = whole.gather(probs_NE)
        moe = self.config.moe
        capacity = expert_capacity(
            whole.size, self.topk, probs_ME.shape[1], moe.moe_expert_capacity_factor or 1.0, moe.moe_min_capacity
        )
        # Stable: of equal tokens the first, on any device.
        order_ME = probs_ME.argsort(dim=0, descending=True, stable=True)
        map_ME = torch.zeros_like(probs_ME, dtype=torch.bool).scatter(0, order_ME[:capacity], True)
        if learns:
            self.cutoff_sums[:-1] += probs_ME.gather(0, order_ME[capacity - 1 : capacity])[0].float()
            self.cutoff_sums[-1] += 1
        return whole.mine(map_ME)

    def finish_step(self, group: dist.ProcessGroup, *, skipped: bool) -> None:
        """Move the cutoffs towards the mean of this step's."""
        super().finish_step(group, skipped=skipped)
        sums = self.cutoff_sums.clone()
        self.cutoff_sums.zero_()
        dist.all_reduce(sums, group=group)
        if skipped or not sums[-1]:
            return
        self.cutoff_steps += 1
        rate = max(1.0 - self.config.routing.router_cutoff_decay, 1.0 / int(self.cutoff_steps))
        self.cutoffs += rate * (sums[:-1] / sums[-1] - self.cutoffs)
