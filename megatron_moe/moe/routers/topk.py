"""Top-k router: megatron-core's, without a bias on its logits, and counting what each expert receives.

Extends `megatron/core/transformer/moe/router.py:TopKRouter`. Its scores, choice, losses and expert bias are called as
they are; `routing` puts them together once more, because a margin or noise on the choice, and what an over-full expert
does, come between them.

Shape legend: S = sequence on this rank, B = batch, N = S * B tokens, E = experts of this layer, H = hidden size.
"""

import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter as MegatronTopKRouter
from torch import Tensor

from megatron_moe.moe.capacity import (
    expert_capacity,
    keep_within_capacity,
    priority_at_random,
    priority_by_position,
)
from megatron_moe.moe.inputs import RoutingInputs
from megatron_moe.moe.routers.base import CountingRouter
from megatron_moe.moe.token_random import token_channel_uniform, token_expert_uniform

# What random numbers are for: the second of their keys.
NOISE, DROPPING, JITTER = 1, 2, 3


class TopKRouter(CountingRouter, MegatronTopKRouter):
    """Top-k routing with megatron-core's scores, losses, expert bias and capacity.

    On purpose not as upstream:
    - no bias on the logits. Upstream adds one whenever the other layers have one; the GPT-MoE and PR-MoE models have
      none (moe_systems: `E * h` parameters);
    - `position` keeps the first tokens (`moe/capacity.py`);
    - the expert bias counts the tokens that an expert works on, not what fills its input up to its capacity, which
      would make all experts look equally busy;
    - jitter is drawn in training only, in fp32 (bf16 knows three numbers within 1 %), and belongs to the token;
    - the gradient of the global balancing loss does not depend on the number of replicas.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
    ) -> None:
        router_config = copy.copy(config)
        router_config.add_bias_linear = False
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
        assert padding_mask is None
        length, batch, experts = logits.shape
        logits_NE = self.apply_z_loss(logits.view(-1, experts))
        scored_NE = self.scored(logits_NE, batch)
        choice_NE = self._with_noise(scored_NE)
        probs_NE, wanted_NE = self._choose(self.weighed(logits_NE, scored_NE), choice_NE)
        map_NE = kept_NE = self._keep(wanted_NE, probs_NE)
        dropped: Tensor | int = 0
        if map_NE is not wanted_NE:
            probs_NE, kept_NE = probs_NE * map_NE, map_NE & wanted_NE
            dropped = wanted_NE.sum() - kept_NE.sum()
        probs_NE = self._attach_losses(probs_NE, scored_NE, choice_NE, (length, batch))
        self._apply_expert_bias(kept_NE)
        self.count(kept_NE, dropped=dropped)
        return probs_NE, map_NE

    # ---- for subclasses

    def scored(self, logits_NE: Tensor, batch: int) -> Tensor:
        """The logits by which experts are chosen and balanced: here, those of the gate."""
        return logits_NE

    def weighed(self, logits_NE: Tensor, scored_NE: Tensor) -> Tensor:
        """The logits that weigh the chosen experts' outputs: here, those of the gate."""
        return logits_NE

    # ---- parts

    def _with_noise(self, scored_NE: Tensor) -> Tensor:
        """RSample: with Gumbel noise, top-1 draws an expert with its softmax probability."""
        if self.config.moe.moe_router_noise == "none" or not self.training:
            return scored_NE
        with torch.no_grad():
            uniform_NE = token_expert_uniform(self._known_inputs(), scored_NE.shape[1], *self._random_keys(NOISE))
            return scored_NE.detach() - torch.log(-torch.log(uniform_NE)).to(scored_NE.dtype)

    def _choose(self, logits_NE: Tensor, choice_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights by `logits_NE` of the experts that `choice_NE` chooses, and their map."""
        if self.routing_type == "sinkhorn":
            return self.sinkhorn_load_balancing(logits_NE)
        config = self.config
        chosen = None
        if choice_NE is not logits_NE:
            _, chosen = topk_routing_with_score_function(
                choice_NE.detach(),
                self.topk,
                use_pre_softmax=config.moe_router_pre_softmax,
                num_groups=config.moe_router_num_groups,
                group_topk=config.moe_router_group_topk,
                score_function=self.score_function,
                expert_bias=self.expert_bias,
                dense_output=True,
            )
        return topk_routing_with_score_function(
            logits_NE,
            self.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            router_replay=self.router_replay,
            precomputed_indices=chosen,
        )

    def _keep(self, wanted_NE: Tensor, probs_NE: Tensor) -> Tensor:
        """The map within the experts' capacity; the same tensor without one."""
        config = self.config
        if config.moe_expert_capacity_factor is None:
            return wanted_NE
        tokens, experts = wanted_NE.shape
        match config.moe_token_drop_policy:
            case "probs":
                priority_NE = probs_NE.detach()
            case "position":
                priority_NE = priority_by_position(wanted_NE)
            case "random":
                priority_NE = priority_at_random(wanted_NE, self._known_inputs(), *self._random_keys(DROPPING))
            case other:
                raise ValueError(f"--moe-token-drop-policy {other}")
        capacity = expert_capacity(
            tokens, self.topk, experts, config.moe_expert_capacity_factor, config.moe.moe_min_capacity
        )
        padded = config.moe_pad_expert_input_to_capacity
        return keep_within_capacity(wanted_NE, priority_NE, capacity, padded=padded)

    def _attach_losses(self, probs_NE: Tensor, scored_NE: Tensor, choice_NE: Tensor, shape: tuple[int, int]) -> Tensor:
        """Upstream's balancing losses: mean scores, times the tokens that noise and margin have sent there."""
        if not (self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled()):
            return probs_NE
        map_NE, scores_NE = compute_routing_scores_for_aux_loss(scored_NE, self.topk, self.score_function)
        if choice_NE is not scored_NE:
            map_NE, _ = compute_routing_scores_for_aux_loss(choice_NE, self.topk, self.score_function)
        probs_NE = self._apply_aux_loss(probs_NE, scores_NE, map_NE)
        probs_NE = self._apply_seq_aux_loss(probs_NE, scores_NE, map_NE, *shape)
        return self._apply_global_aux_loss(probs_NE, scores_NE, map_NE)

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """The input [S, B, H] times U(1 - eps, 1 + eps) in training (Switch Transformer), drawn for every channel."""
        eps = self.config.moe_input_jitter_eps
        if eps is None or not self.training:
            return input
        keys = self._random_keys(JITTER)
        uniform_NH = token_channel_uniform(self._known_inputs(), input.shape[-1], *keys)
        return input.float() * (1.0 - eps + 2.0 * eps * uniform_NH).view(input.shape)

    def _random_keys(self, purpose: int) -> tuple[int, int, int, int]:
        assert self.layer_number is not None
        return self.config.seed, purpose, self.step, self.layer_number

    def _known_inputs(self) -> RoutingInputs:
        assert self.inputs is not None, "random numbers belong to tokens: the layer needs its routing inputs"
        return self.inputs

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
