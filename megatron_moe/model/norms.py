"""LayerNorm and RMSNorm that work with sequence parallelism without Apex or Transformer Engine.

megatron-core's torch norms refuse sequence parallelism (`transformer/torch_norm.py:WrappedTorchNorm`), because the
gradients of a norm's weights must then be summed over the tensor-parallel ranks. Marking the parameters is all that
`finalize_model_grads` needs to do so.
"""

import torch
from megatron.core.transformer import TransformerConfig


def build_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
) -> torch.nn.LayerNorm | torch.nn.RMSNorm:
    """The norm that `config.normalization` names, over the last dimension.

    Matches `megatron.core.transformer.torch_norm.LayerNormBuilder`; `unused` swallows what Apex's norms take.
    """
    norm: torch.nn.LayerNorm | torch.nn.RMSNorm
    device, dtype = torch.cuda.current_device(), config.params_dtype
    if config.normalization == "RMSNorm":
        norm = torch.nn.RMSNorm(hidden_size, eps=eps, device=device, dtype=dtype)
    else:
        norm = torch.nn.LayerNorm(hidden_size, eps=eps, device=device, dtype=dtype)
    for parameter in norm.parameters():
        # read by megatron/core/distributed/finalize_model_grads.py:_allreduce_non_tensor_model_parallel_grads
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
