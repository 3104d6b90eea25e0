"""Expert residual network (PAI GPT-MoE, `--use-expert-residual-network`): a small deep network after the experts.

With c the routed experts' combined output of a token and p its routing weights,

    c <- alpha * R(c) + (1 - alpha) * c,    alpha = max_e p_e,

where R is a stack of blocks x + W2 relu(W1 norm(x)), W1 from H to 4H and W2 back, as in BASE layers (arXiv 2103.16716).
W2 and the biases start at zero, so that R is the identity and a run starts as it would without. alpha is the largest
weight that the router really applied: 1 for routers whose weights are 1, 0 for a token that found no expert.

It comes before shared experts and the residual MLP are added. It is computed as c + alpha * (R(c) - c), which is c to
the bit at the start.

Shape legend: S = sequence on this rank, B = batch, H = hidden size, N = S * B tokens, E = experts.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

# A block's width over the hidden size.
EXPANSION = 4


@dataclass
class ExpertResidualSubmodules:
    """Parts of an `ExpertResidual`."""

    norm: Any
    """Builder of a norm over H."""
    mlp: MLPSubmodules


class ResidualBlock(MegatronModule):
    """x + W2 relu(W1 norm(x))."""

    def __init__(
        self, config: Any, submodules: ExpertResidualSubmodules, pg_collection: ProcessGroupCollection
    ) -> None:
        config = copy.copy(config)
        config.ffn_hidden_size = EXPANSION * config.hidden_size
        config.gated_linear_unit, config.activation_func = False, F.relu
        super().__init__(config=config)
        self.norm = submodules.norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config, submodules.mlp, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp)

    def forward(self, x_SBH: Tensor) -> Tensor:
        """One block, [S, B, H] to [S, B, H]."""
        change_SBH, bias_H = self.mlp(self.norm(x_SBH))
        if bias_H is not None:
            change_SBH = change_SBH + bias_H
        return x_SBH + change_SBH


class ExpertResidual(MegatronModule):
    """The blocks, and the mix of what goes in and what comes out. Blocks are submodules named 0, 1, 2, ..."""

    def __init__(
        self, config: Any, submodules: ExpertResidualSubmodules, pg_collection: ProcessGroupCollection
    ) -> None:
        super().__init__(config=config)
        for number in range(config.moe.expert_residual_layers):
            self.add_module(str(number), ResidualBlock(config, submodules, pg_collection))

    def forward(self, combined_SBH: Tensor, weights_NE: Tensor) -> Tensor:
        """Mix by each token's largest routing weight.

        Args:
            combined_SBH: the routed experts' output.
            weights_NE: routing weights of the same tokens; 0 where an expert does not take part.
        """
        x_SBH = combined_SBH
        for block in self.children():
            x_SBH = block(x_SBH)
        alpha_SB1 = weights_NE.amax(dim=-1).view(*combined_SBH.shape[:-1], 1).to(combined_SBH.dtype)
        return combined_SBH + alpha_SB1 * (x_SBH - combined_SBH)
