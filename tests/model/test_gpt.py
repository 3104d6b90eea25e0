"""Every variant of the decoder builds, counts right, trains all its parameters, and equals itself under tensor 2.

A pairwise covering set stands for the full product of the variants: any two choices occur together in some row.
"""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.model.parameters import count_parameters
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, assert_close, start_model, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run

CHOICES: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("learned_absolute", "rope", "none"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "swiglu": (False, True),
    "disable_bias_linear": (False, True),
    "untie_embeddings_and_output_weights": (False, True),
    "num_query_groups": (4, 2),
    "qk_layernorm": (False, True),
    "mlp_type": ("standard", "residual"),
}
# A row is an index into each of the choices.
ROWS = ("00010000", "01100001", "01111110", "10000100", "10101111", "11011011", "20000011", "21111100")
TRAINING = {"vocab_size": 900, "train_iters": 2, "clip_grad": 0.0, "optimizer": "sgd", "lr": 0.1, "moe_router_topk": 2}


def variant(row: str) -> dict[str, Any]:
    return {name: values[int(index)] for (name, values), index in zip(CHOICES.items(), row, strict=True)}


def test_rows_cover_every_pair_of_choices() -> None:
    rows = [variant(row) for row in ROWS]
    for (one, ones), (two, twos) in combinations(CHOICES.items(), 2):
        there = {(row[one], row[two]) for row in rows}
        assert there == {(a, b) for a in ones for b in twos}, (one, two)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_variant(row: str, tiny_data: Path) -> None:
    """Tolerance as in tests/moe/test_experts.py: fp32 sums in another order."""
    flags = data_flags(tiny_data) | TRAINING | variant(row)
    one: Trained = run_ranks(1, train_and_gather, tiny_run(**flags))[0]
    gradients = assemble([one.gradients])

    assert (
        sum(tensor.size for tensor in gradients.values())
        == count_parameters(tiny_run(**flags), padded_vocab=True).total
    )
    assert all(sum(tokens) == 2 * 8 * 32 for tokens in one.loads.values())
    for key, gradient in gradients.items():
        assert np.isfinite(gradient).all(), key
        if ".experts." in key:
            layer = int(key.split(".")[2]) + 1
            assert [bool(expert.any()) for expert in gradient] == [tokens > 0 for tokens in one.loads[layer]], key
        else:
            assert gradient.any(), f"{key} gets no gradient"

    sizes = {"tensor_model_parallel_size": 2}
    two: list[Trained] = run_ranks(2, train_and_gather, tiny_run(**flags, **sizes))
    for rank in two:
        assert rank.losses == pytest.approx(one.losses, rel=2e-6)
        assert rank.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
    assert_close(assemble([rank.gradients for rank in two]), gradients, 2e-5)


def test_dense_model_with_and_without_sequence_parallelism(tiny_data: Path) -> None:
    flags = (
        data_flags(tiny_data)
        | TRAINING
        | {"num_experts": None, "expert_interval": 1, "mlp_type": "standard", "moe_router_topk": 1}
    )
    one: Trained = run_ranks(1, train_and_gather, tiny_run(**flags))[0]
    for sequence_parallel in (False, True):
        sizes = {"tensor_model_parallel_size": 2, "sequence_parallel": sequence_parallel}
        two: list[Trained] = run_ranks(2, train_and_gather, tiny_run(**flags, **sizes))
        for rank in two:
            assert rank.losses == pytest.approx(one.losses, rel=2e-6)
            assert rank.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
        assert_close(assemble([rank.gradients for rank in two]), assemble([one.gradients]), 2e-5)


def forward_with_dropout(flags: dict[str, Any]) -> dict[str, Any]:
    """Which embedding values dropout zeroed on this rank, the decoder's output there, and the loss."""
    run = tiny_run(vocab_size=128, hidden_dropout=0.2, attention_dropout=0.2, **flags)
    (model,) = start_model(run)
    model.train()
    seen: dict[str, Any] = {}
    model.embedding.embedding_dropout.register_forward_hook(
        lambda module, args, out: seen.update(zeros=(out == 0).numpy())
    )
    model.decoder.register_forward_hook(lambda module, args, out: seen.update(hidden=out.detach().numpy().copy()))
    tokens = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(1))
    loss = model(tokens, torch.arange(32).expand(2, -1), None, labels=tokens)
    loss.mean().backward()
    gradients = all(
        bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None
    )
    return {"loss": float(loss.mean()), "finite": gradients, **seen}


def test_dropout_under_sequence_parallelism_differs_between_ranks() -> None:
    """Each rank holds other places of the sequence: equal masks would be a pattern."""
    first, second = run_ranks(2, forward_with_dropout, {"tensor_model_parallel_size": 2})
    assert np.isfinite(first["loss"])
    assert first["finite"]
    assert second["finite"]
    assert first["zeros"].shape == second["zeros"].shape
    assert first["zeros"].mean() == pytest.approx(0.2, abs=0.03)
    assert second["zeros"].mean() == pytest.approx(0.2, abs=0.03)
    # Independent masks agree in 0.2^2 + 0.8^2 = 0.68 of the places.
    assert (first["zeros"] == second["zeros"]).mean() == pytest.approx(0.68, abs=0.05)


def test_dropout_without_sequence_parallelism_is_the_same_on_every_rank() -> None:
    """Ranks hold copies of the same hidden states: other masks would make them drift apart."""
    flags = {"tensor_model_parallel_size": 2, "num_experts": None, "expert_interval": 1, "mlp_type": "standard"}
    first, second = run_ranks(2, forward_with_dropout, flags)
    assert first["zeros"].mean() == pytest.approx(0.2, abs=0.03)
    np.testing.assert_array_equal(first["zeros"], second["zeros"])
    np.testing.assert_array_equal(first["hidden"], second["hidden"])
