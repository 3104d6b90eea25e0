"""RMSNorm over all query heads, or all key heads, of a token together (OLMoE), where the heads are spread over ranks.

megatron-core's attention calls its query and key norms with the heads of a rank (`transformer/attention.py:
SelfAttention.get_query_key_value_tensors`), and sums the gradients of every parameter named `q_layernorm` or
`k_layernorm` over the tensor-parallel ranks (`distributed/finalize_model_grads.py:
_allreduce_non_tensor_model_parallel_grads`). So each rank has all weights and uses those of its own heads: the sum
completes their gradient.

Shape legend: S = tokens, B = batch, N = heads on this rank, D = head width.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from torch import Tensor


class ProjectionNorm(torch.nn.Module):
    """Norm of the heads of all tensor-parallel ranks as one vector.

    Args:
        hidden_size: D; upstream's name.
        config: of the layer.
        heads: of the whole model.
        eps: inside the root.
    """

    def __init__(
        self, hidden_size: int, config: TransformerConfig, *, heads: int, eps: float = 1e-5, **unused: object
    ) -> None:
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.eps, self.width = eps, heads * hidden_size
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(self.width, device=device, dtype=config.params_dtype))

    def forward(self, x_SBND: Tensor) -> Tensor:
        """[S, B, N, D], in the input's type; fp32 inside, as torch's RMSNorm."""
        ranks = self.group.size()
        x = x_SBND.float()
        squares = x.square().sum(dim=(-2, -1), keepdim=True)
        if ranks > 1:
            squares = _SumOverRanks.apply(squares, self.group)
        weight_ND = self.weight.chunk(ranks)[self.group.rank()].view(x_SBND.shape[-2:])
        return (x * torch.rsqrt(squares / self.width + self.eps) * weight_ND).to(x_SBND.dtype)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce. Every rank's heads depend on the sum, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
