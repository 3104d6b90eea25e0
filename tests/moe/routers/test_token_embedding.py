"""`token-embedding`: the gate's logits come from the token id; one embedding serves all layers, wherever they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.distributed import run_ranks
from tests.helpers.equivalence import SMOOTH_ADAM
from tests.helpers.models import Trained, assemble, assert_close, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run

TOKEN = {"router": "token-embedding", "router_embedding_size": 8, "expert_interval": 1, "num_experts": (4, 8, 4, 8)}
# More than one expert a token, so that their weights have a gradient without the balancing loss too.
FLAGS: dict[str, Any] = TOKEN | SMOOTH_ADAM | {"moe_router_topk": 2}
ZERO = {"use_distributed_optimizer": True}
PIPELINE = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PP 2 interleaved x DP 2, ZeRO-1": (4, PIPELINE | ZERO | {"num_layers_per_virtual_pipeline_stage": 1}),
    "PP 2 x TP 2, full recompute": (
        4,
        PIPELINE | {"tensor_model_parallel_size": 2, "recompute_granularity": "full", "recompute_method": "uniform"},
    ),
    "PP 2 x EP 2, ZeRO-1, allgather": (
        4,
        PIPELINE | ZERO | {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"},
    ),
    "CP 2 x DP 2": (4, {"context_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def one_process(tiny_data: Path) -> Trained:
    return run_ranks(1, train_and_gather, tiny_run(**data_flags(tiny_data), **FLAGS))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_one_process(layout: str, one_process: Trained, tiny_data: Path) -> None:
    """Three steps: losses, norms, loads, and the gradients of the last, of which copies must be equal bit for bit."""
    ranks, flags = LAYOUTS[layout]
    results = run_ranks(ranks, train_and_gather, tiny_run(**data_flags(tiny_data), **FLAGS | flags))
    whole = assemble([result.gradients for result in results])
    assert_close(whole, assemble([one_process.gradients]), relative=5e-5)
    assert results[0].losses == pytest.approx(one_process.losses, rel=2e-6)
    assert results[0].grad_norms == pytest.approx(one_process.grad_norms, rel=1e-5)
    assert results[0].loads == one_process.loads
    assert np.abs(whole["routing_embedding.table"]).max() > 0
