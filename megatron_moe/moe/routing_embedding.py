"""A routing embedding of the token id, and gates on it: what `routers/token_embedding.py` takes its logits from.

Shared by all layers, it has a copy in every model chunk, on each pipeline stage and virtual stage, whether or not the
chunk has MoE layers. The copies start equal (`model/init.py` draws by name), get the sum of all their gradients
(upstream's `distributed/finalize_model_grads.py:_allreduce_conditional_embedding_grads`, for parameters marked
`pipeline_parallel` where the config says `has_cond_embedder`), and so stay equal.

Shape legend: V = token ids, N = tokens, R = width of the routing embedding, E = experts.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor, nn


class RoutingEmbedding(MegatronModule):
    """The embedding [V, R], and a gate [E, R] for every number of experts that occurs.

    Args:
        config: of the model.
        counts: numbers of experts.
        chunk: which chunk of the model this copy belongs to, if it is one of several; None for a layer's own.
    """

    def __init__(self, config: Any, counts: Collection[int], chunk: int | None = None) -> None:
        super().__init__(config=config)
        self._chunk = chunk
        width = config.routing.router_embedding_size
        shapes = {"table": (config.vocab_rows, width)}
        shapes |= {f"gate_{count}": (count, width) for count in sorted(set(counts))}
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            self.register_parameter(name, nn.Parameter(weight))
            parameter: Any = self.get_parameter(name)
            # Every tensor-parallel rank routes its part of the sequence.
            parameter.sequence_parallel = config.sequence_parallel
            if chunk is not None:
                parameter.pipeline_parallel = True
                # Upstream's mark for a bucket of its own: with ZeRO-1 each replica holds the same slice of it on
                # every stage, so that slices can be summed (`distrib_optimizer.py:_does_param_require_new_bucket`).
                parameter.shared_embedding = True
                # The norm of the gradients counts one copy.
                parameter.shared = chunk > 0

    def logits(self, token_N: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
        """[N, E], computed in `dtype`."""
        rows_NR = F.embedding(token_N, self.get_parameter("table"))
        return rows_NR.to(dtype) @ self.get_parameter(f"gate_{experts}").to(dtype).t()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Each tensor under one key, whole; the first chunk's first rank writes it."""
        if self._chunk is None:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        replica = (
            self._chunk,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
        return {
            f"{prefix}{name}": make_sharded_tensor_for_checkpoint(parameter, f"{prefix}{name}", replica_id=replica)
            for name, parameter in self.named_parameters()
        }
