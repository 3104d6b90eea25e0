"""Experts as stacked weights, one tensor for each of the two matrices: no loop over modules, small state in training.

Equal to `sequential.py` in what it computes, in its initial weights and in the checkpoints it writes.
"""

from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from torch import Tensor

from megatron_moe.config.base import ConfigError
from megatron_moe.moe.experts.activations import Activation
from megatron_moe.moe.experts.functions import ExpertMath, ExpertWeights, expert_mlp
from megatron_moe.moe.experts.layouts import load_any_layout
from megatron_moe.moe.experts.sharding import sharded_experts

# torch.nn.functional.grouped_mm: "strides should be multiple of 16 bytes".
ALIGNMENT = 16


class ExpertLinear(torch.nn.Module):
    """One matrix of every expert of this rank, [E, out, in], and their biases [E, out].

    Args:
        config: of the layer.
        shape: of the weight on this rank.
        bias: whether there are biases.
        split: dimension of one expert's matrix that tensor parallelism splits: 0 (column parallel) or 1 (row parallel).
    """

    def __init__(self, config: Any, shape: tuple[int, int, int], *, bias: bool, split: int) -> None:
        super().__init__()
        stride = 2 if config.gated_linear_unit and split == 0 else 1
        # As tensor_parallel/layers.py:ColumnParallelLinear: these groups reduce the gradients of experts.
        expert_groups = (
            config.expert_model_parallel_size > 1
            or config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=1 + split, stride=stride)
        self.weight.allreduce = not expert_groups  # type: ignore[attr-defined]
        self.bias: torch.nn.Parameter | None = None
        if not bias:
            return
        self.bias = torch.nn.Parameter(torch.empty(shape[:2], dtype=config.params_dtype, device=device))
        self.bias.allreduce = not expert_groups  # type: ignore[attr-defined]
        if split == 0:
            set_tensor_model_parallel_attributes(self.bias, is_parallel=True, dim=1, stride=stride)
        else:
            # Every rank of the expert's group sees all its tokens, so every rank has the whole gradient already.
            self.bias.sequence_parallel = False  # type: ignore[attr-defined]

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias. Called for them, a module runs its hooks: with --overlap-param-gather one of them waits for
        the weights to arrive (`distributed/distributed_data_parallel.py:_make_forward_pre_hook`)."""
        return self.weight, self.bias


class GroupedExperts(MegatronModule):
    """All experts of a rank.

    Args:
        num_local_experts: on this rank.
        config: of the layer.
        pg_collection: `ep`, `expt_tp` and `expt_dp` are used.
        name: upstream's, not used.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: Any,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group, self.dp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        hidden, ffn = config.hidden_size, config.moe_ffn_hidden_size // self.tp_group.size()
        self.activation = Activation(config.activation_func, gated=config.gated_linear_unit)
        width = 2 * ffn if config.gated_linear_unit else ffn
        bias = config.add_bias_linear
        self.linear_fc1 = ExpertLinear(config, (num_local_experts, width, hidden), bias=bias, split=0)
        self.linear_fc2 = ExpertLinear(config, (num_local_experts, hidden, ffn), bias=bias, split=1)
        if self.linear_fc1.weight.is_cuda:
            check_alignment(config.params_dtype, config.hidden_size, ffn)
        self._register_load_state_dict_pre_hook(load_any_layout, with_module=True)

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Output of the experts; its biases are in it.

        Args:
            permuted_local_hidden_states: rows sorted by expert, [R, H].
            tokens_per_expert: of this rank's experts, [E].
            permuted_probs: routing weights [R].
        """
        x_RH, probs_R = permuted_local_hidden_states, permuted_probs
        if self.config.moe_apply_probs_on_input:
            # As SequentialMLP.forward.
            x_RH = (probs_R.unsqueeze(-1) * x_RH).to(x_RH.dtype)
            probs_R = torch.ones_like(probs_R)
        ends_E = tokens_per_expert.to(x_RH.device, non_blocking=True).cumsum(dim=0, dtype=torch.int32)
        math = ExpertMath(self.activation, self._dropout, self.tp_group.size(), keep=torch.is_grad_enabled())
        weights = ExpertWeights(*self.linear_fc1(), *self.linear_fc2())
        return expert_mlp(x_RH.contiguous(), probs_R, ends_E, self._mask(x_RH), weights, math), None

    @property
    def _dropout(self) -> float:
        return self.config.moe.moe_expert_dropout if self.training else 0.0

    def _mask(self, x_RH: Tensor) -> Tensor | None:
        """Switch Transformer's expert dropout, as `ExpertRowParallelLinear._dropout`: what stays, [R, F]."""
        if self._dropout == 0.0:
            return None
        shape = (len(x_RH), self.linear_fc2.weight.shape[2])
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            return torch.empty(shape, dtype=torch.bool, device=x_RH.device).bernoulli_(1.0 - self._dropout)

    def backward_dw(self) -> None:
        """Nothing: upstream's interface for weight gradients that are put off."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """What checkpoints hold: the keys and shapes of upstream's `SequentialMLP`."""
        return sharded_experts(self, prefix, sharded_offsets, metadata)


def grouped_experts() -> ExpertsBuilder:
    """Builder of stacked experts."""
    return partial(GroupedExperts)


def check_alignment(dtype: torch.dtype, hidden: int, ffn: int) -> None:
    """What `grouped_mm` demands of sizes.

    Raises:
        ConfigError: it does not take these.
    """
    multiple = ALIGNMENT // dtype.itemsize
    for what, size in (("--hidden-size", hidden), ("width of an expert on a rank", ffn)):
        if size % multiple:
            raise ConfigError(
                f"{what} {size}: must be a multiple of {multiple} with --moe-expert-backend grouped in {dtype}; "
                "or give --moe-expert-backend sequential"
            )
