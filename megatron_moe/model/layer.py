"""A transformer layer whose attention takes something from the layer before and hands something on.

It travels as `context`, the argument that megatron-core keeps for the encoder's output of an encoder-decoder: every
layer returns it, the next one receives it, and activation recompute passes it in and out of each stretch of layers with
its gradient. A decoder leaves it unused. It is not sent between pipeline stages.
"""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

# Upstream that this relies on: `recompute.py:checkpointed_forward` and
# `transformer_block.py:TransformerBlock.forward` call `hidden_states, context = layer(..., context=context)`;
# `transformer_layer.py:TransformerLayer.forward` returns (hidden states, context).


class CarryingLayer(TransformerLayer):
    """Puts what the layer before left into `self_attention.carried`, and returns what the attention leaves there."""

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Upstream's layer.

        Args:
            args, kwargs: of `TransformerLayer.forward`.
            context: what the layer before hands on; None at the beginning of a pipeline stage.

        Returns:
            Hidden states, and what this layer hands on.
        """
        attention = self.self_attention
        attention.carried = context
        try:
            hidden_states, _ = super().forward(*args, context=None, **kwargs)
            return hidden_states, attention.carried
        finally:
            # The next micro-batch must not find this one's, nor its memory be kept.
            attention.carried = None
