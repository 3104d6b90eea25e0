"""Dense MLP: megatron-core's, safe to recompute when its layers have biases.

`megatron/core/transformer/mlp.py:MLP.forward` returns the output bias itself, to be added with the dropout. Under
`--recompute-modules mlp` that parameter becomes an output of the checkpoint function
(`tensor_parallel/random.py:CheckpointFunction`), so autograd takes it for the function's result: its gradient would
run the recompute again, for ever.
"""

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor


class DenseMlp(MLP):
    """Dense MLP of a layer."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output [S, B, H], and the bias [H] that is still to be added: a copy of it where it is recomputed."""
        output, bias = super().forward(hidden_states, per_token_scale, **kwargs)
        if bias is not None and "mlp" in (self.config.recompute_modules or ()):
            bias = bias.clone()
        return output, bias
