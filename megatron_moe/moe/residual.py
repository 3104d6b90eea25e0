"""Residual MoE (PR-MoE, arXiv 2201.05596 section 4.1): a dense MLP that every token takes beside its expert.

`softmax`: y = a * experts(x) + b * mlp(x), [a, b] = softmax(W_c x + b_c) over the last dimension, as in DeepSpeed's
code. `add`: y = experts(x) + mlp(x), as in the paper's text. experts(x) holds the gate's weight already.

Shape legend: S = sequence on this rank, B = batch, H = hidden size.
"""

import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class ResidualMlp(MegatronModule):
    """Dense MLP of an expert's width, and the coefficient that weighs it against the experts."""

    def __init__(self, config: Any, submodules: MLPSubmodules, pg_collection: ProcessGroupCollection) -> None:
        # MLP sizes its second layer by the config's width, whatever is passed: give it a config of the expert's width.
        config = copy.copy(config)
        config.ffn_hidden_size = config.moe_ffn_hidden_size
        super().__init__(config=config)
        self.mlp = MLP(config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp)
        self.coefficient: torch.nn.Linear | None = None
        if config.residual_combine == "softmax":
            self.coefficient = torch.nn.Linear(
                config.hidden_size, 2, device=torch.cuda.current_device(), dtype=config.params_dtype
            )
            for parameter in self.coefficient.parameters():
                # Replicated over the tensor-parallel ranks; with sequence parallelism each sees a part of the tokens
                # and finalize_model_grads must sum their gradients.
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBH: Tensor, routed_SBH: Tensor) -> Tensor:
        """Combine the experts' output with the dense MLP's, both [S, B, H]."""
        dense_SBH, bias_H = self.mlp(hidden_SBH)
        if bias_H is not None:
            dense_SBH = dense_SBH + bias_H
        if self.coefficient is None:
            return routed_SBH + dense_SBH
        weights_SB2 = torch.softmax(self.coefficient(hidden_SBH).float(), dim=-1).to(dense_SBH.dtype)
        return routed_SBH * weights_SB2[..., 0:1] + dense_SBH * weights_SB2[..., 1:2]
