"""`--qk-layernorm-type projection`: all heads as one vector, against plain torch, under every layout, with a cache."""

from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import parse_run
from megatron_moe.model.parameters import attention_size
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, assert_close, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run
from tests.inference.conftest import train
from tests.inference.on_ranks import cache_error, greedy_ways
from tests.model.test_weight_reuse import DENSE, MODERN

PROJECTION: dict[str, Any] = {"qk_layernorm_type": "projection"}
SHARING = {"cla_share_factor": 2}


def errors_against_plain(runs: list[Any]) -> list[tuple[float, float]]:
    """Of every run: error of losses and gradients, and error of a reference that normalises each head by itself with
    the same weights."""
    from torch import Tensor

    from megatron_moe.config.attention import source_layer
    from megatron_moe.model.gpt import build_model
    from tests.helpers import plain_gpt
    from tests.helpers.models import perturb, start_model

    def by_head(run: Any, part: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        if "_layernorm" not in name or "self_attention" not in name:
            return norm(run, part, name, x)
        heads = x.unflatten(-1, (-1, run.model.head_dim))
        scale = heads.square().mean(-1, keepdim=True).add(run.model.norm_epsilon).rsqrt()
        return (heads * scale).flatten(-2) * part[f"{name}.weight"]

    norm = plain_gpt._norm
    start_model(runs[0])
    results = []
    for run in runs:
        (chunk,) = build_model(run)
        perturb([chunk])
        batch = plain_gpt.tokens(run)
        actual = plain_gpt.losses_and_gradients(chunk.train(), plain_gpt.model_losses(chunk, batch))
        layers = range(run.model.num_layers)
        sources = [source_layer(layer + 1, run.model.cla_share_factor) - 1 for layer in layers]
        errors = []
        for function in (norm, by_head):
            plain_gpt._norm = function
            losses = plain_gpt.plain_losses(chunk, run, *batch[:2], sources=sources)
            errors.append(plain_gpt.largest_error(actual, plain_gpt.losses_and_gradients(chunk, losses)))
        results.append((errors[0], errors[1]))
    return results


def test_equals_a_plain_loop() -> None:
    """Outputs and gradients, with two query heads to a key head; a layer that uses another one's keys normalises them
    with weights of its own."""
    runs = [tiny_run(**DENSE, **MODERN, **PROJECTION), tiny_run(**DENSE, **MODERN, **PROJECTION, **SHARING)]
    for error, by_head in run_ranks(1, errors_against_plain, runs)[0]:
        # fp32 sums in another order.
        assert error < 2e-5
        assert by_head > 1e-3


@pytest.fixture(scope="module")
def flags(tiny_data: Path) -> dict[str, Any]:
    more = {"clip_grad": 0.0, "init_method_std": 0.4, "train_iters": 2}
    return data_flags(tiny_data) | MODERN | PROJECTION | more | {"max_position_embeddings": 48, "tensorboard": False}


def test_tensor_parallel_ranks_agree(flags: dict[str, Any]) -> None:
    """Losses of all steps, and the last step's gradients, as of one process; with sequence parallelism and recompute,
    and every second layer with keys that another one made."""
    sizes = {"tensor_model_parallel_size": 2, "recompute_granularity": "full", "recompute_method": "uniform"}
    one: Trained = run_ranks(1, train_and_gather, tiny_run(**flags, **SHARING))[0]
    two: list[Trained] = run_ranks(2, train_and_gather, tiny_run(**flags, **SHARING, **sizes))
    for rank in two:
        assert rank.losses == pytest.approx(one.losses, rel=2e-6)
        assert rank.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
    assert_close(assemble([rank.gradients for rank in two]), assemble([one.gradients]), 1e-4)


def test_cached_text_equals_uncached(tmp_path: Path, tiny_data: Path) -> None:
    """Logits over a text with a cache, and greedy continuations in every way, of a checkpoint of two ranks."""
    folder = train(tmp_path / "run", tiny_data, 2, **MODERN, **PROJECTION, tensor_model_parallel_size=2)
    error, size = run_ranks(1, cache_error, folder)[0]
    assert error < 2e-5 * size
    ways = run_ranks(1, greedy_ways, folder)[0]
    assert len({str(texts) for texts in ways.values()}) == 1


def test_counts() -> None:
    """Four query heads and two key heads of 8 channels."""
    run, heads = tiny_run(**DENSE, **MODERN, **PROJECTION), tiny_run(**DENSE, **MODERN)
    assert attention_size(run).total - attention_size(heads).total == (4 + 2) * 8 - 2 * 8


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        ("--normalization RMSNorm", "--qk-layernorm"),
        ("--qk-layernorm", "--normalization RMSNorm"),
        ("--qk-layernorm --normalization RMSNorm --transformer-impl transformer_engine", "--transformer-impl local"),
    ],
)
def test_what_it_needs(words: str, needs: str) -> None:
    with pytest.raises(ConfigError, match=f"^--qk-layernorm-type projection: needs {needs}$"):
        parse_run(f"--qk-layernorm-type projection {words}".split(), prog="pretrain", description="")
