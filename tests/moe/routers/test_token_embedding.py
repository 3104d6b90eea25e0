"""`token-embedding`: the gate's logits come from the token id; one embedding serves all layers, wherever they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.config.base import ConfigError
from megatron_moe.config.validate import validate
from tests.helpers.distributed import run_ranks
from tests.helpers.equivalence import SMOOTH_ADAM
from tests.helpers.models import Shard, Trained, assemble, assert_close, shards, start_model, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import build_trainer, record_curve, train_curve

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


def layer_and_loops(shared: bool) -> dict[str, float]:
    """Logits, weights, load and gradients of every layer's router, and their distance from plain loops."""
    from megatron_moe.moe.inputs import pack_inputs, unpack_inputs
    from megatron_moe.moe.layer import moe_layers

    flags = {"router_embedding_shared": shared, "moe_router_topk": 2, "vocab_size": 100, "moe_aux_loss_coeff": 0.0}
    (model,) = start_model(tiny_run(**TOKEN | flags), perturbed=True)
    torch.manual_seed(0)
    tokens_BS = torch.randint(0, 100, (3, 8))
    inputs = unpack_inputs(pack_inputs(tokens_BS, torch.arange(3)))
    tables = {name: p for name, p in model.named_parameters() if "routing_embedding" in name or ".router." in name}
    total, again = torch.zeros(()), torch.zeros(())
    distances, chosen = {}, {}
    for number, layer in enumerate(moe_layers(model), start=1):
        router, experts = layer.router, layer.config.num_moe_experts
        weight = torch.randn(24, experts)
        router.inputs = inputs
        probs, routed = router(torch.randn(8, 3, 32))
        total = total + (probs * weight).sum()
        place = "routing_embedding." if shared else f"decoder.layers.{number - 1}.mlp.router.own."
        table, gate = tables[f"{place}table"], tables[f"{place}gate_{experts}"]
        expected = torch.zeros(24, experts)
        for at in range(8):
            for row in range(3):
                logits = torch.stack([table[tokens_BS[row, at]] @ gate[e] for e in range(experts)])
                best = logits.argsort(descending=True)[:2]
                shares = logits[best].softmax(dim=0)
                expected = expected.index_put((torch.tensor(at * 3 + row), best), shares)
        again = again + (expected * weight).sum()
        distances[f"weights {number}"] = float((probs - expected).detach().abs().max())
        distances[f"map {number}"] = float((routed != (expected > 0)).sum())
        distances[f"load {number}"] = float((router.take_load()[:-2] - (expected > 0).sum(dim=0)).abs().max())
        chosen[number] = routed
    gradients = torch.autograd.grad(total, list(tables.values()))
    expected_gradients = torch.autograd.grad(again, list(tables.values()))
    for name, one, two in zip(tables, gradients, expected_gradients, strict=True):
        distances[name] = float((one - two).abs().max())
        assert float(two.abs().max()) > 1e-4
    # Layers 1 and 3 have 4 experts.
    distances["layers differ"] = float((chosen[1] != chosen[3]).sum())
    distances["parameters"] = len(tables)
    return distances


@pytest.mark.parametrize("shared", [True, False])
def test_a_router_equals_loops(shared: bool) -> None:
    """The upstream gate on the hidden state is no parameter; layers of as many experts agree if they share."""
    (found,) = run_ranks(1, layer_and_loops, shared)
    assert found.pop("parameters") == (3 if shared else 8)
    assert (found.pop("layers differ") == 0) == shared
    for name, distance in found.items():
        assert distance < 1e-5, name


def resume(run: Any) -> tuple[list[float], list[float], list[Shard]]:
    trainer = build_trainer(run)
    curve = record_curve(trainer)
    return curve.losses, curve.grad_norms, shards(trainer.model)


def test_a_checkpoint_holds_one_copy_and_goes_on_anywhere(tiny_data: Path, tmp_path: Path) -> None:
    """Written on interleaved stages with ZeRO-1; resumed there bit for bit, and by one process."""
    interleaved = ZERO | PIPELINE | {"num_layers_per_virtual_pipeline_stage": 1}
    flags = data_flags(tiny_data) | FLAGS | {"save": str(tmp_path / "run"), "train_iters": 4, "save_interval": 2}
    whole = run_ranks(2, resume, tiny_run(**flags | interleaved))
    expected = assemble([rank[2] for rank in whole])
    for ranks, sizes in ((2, interleaved), (1, {})):
        (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2\n")
        run = tiny_run(**flags | sizes | {"load": str(tmp_path / "run"), "save": str(tmp_path / f"{len(sizes)}")})
        resumed = run_ranks(ranks, resume, run)
        weights = assemble([rank[2] for rank in resumed])
        if sizes == interleaved:
            assert resumed[0][0] == whole[0][0][2:]
            for key, tensor in expected.items():
                np.testing.assert_array_equal(weights[key], tensor, err_msg=key)
        else:
            assert resumed[0][0] == pytest.approx(whole[0][0][2:], rel=2e-6)
            assert resumed[0][1] == pytest.approx(whole[0][1][2:], rel=1e-5)
            assert_close(weights, expected, relative=2e-5)


def text_of_a_saved_model(folder: Path) -> list[int]:
    """Continue with and without a cache, alone and in batches; how many different tokens each continuation has."""
    from megatron_moe.inference.generation import generate
    from megatron_moe.inference.model import load_for_inference
    from megatron_moe.inference.options import SamplingOptions

    model = load_for_inference(str(folder), tiny_run().parallel)
    prompts = [model.tokenizer.encode(text) for text in ("北京的工程师", "因为天气很好，上海的老师")]
    ways = [
        [done.ids for done in generate(model, prompts, SamplingOptions(greedy=True), max_new_tokens=8, **options)]
        for options in ({}, {"kv_cache": False}, {"micro_batch_size": 1})
    ]
    assert ways[0] == ways[1] == ways[2]
    return [len(set(ids)) for ids in ways[0]]


def test_a_saved_model_continues_texts(tiny_data: Path, tmp_path: Path) -> None:
    flags = {"save": str(tmp_path), "init_method_std": 0.4, "max_position_embeddings": 48, "train_iters": 2}
    run_ranks(1, train_curve, tiny_run(**data_flags(tiny_data) | TOKEN | flags))
    (different,) = run_ranks(1, text_of_a_saved_model, tmp_path)
    assert max(different) > 1


def test_what_it_cannot_do_is_refused() -> None:
    overlapped = ZERO | {"overlap_grad_reduce": True}
    with pytest.raises(ConfigError, match="--overlap-grad-reduce: cannot be combined with --router token-embedding"):
        validate(tiny_run(**TOKEN | overlapped), 1)
    validate(tiny_run(**TOKEN | overlapped | {"router_embedding_shared": False}), 1)
    with pytest.raises(ConfigError, match=r"--moe-input-jitter-eps 0\.1: has no meaning for --router token-embedding"):
        validate(tiny_run(**TOKEN, moe_input_jitter_eps=0.1), 1)
    with pytest.raises(
        ConfigError, match="--router-embedding-size 8: belongs to --router token-embedding, not to topk"
    ):
        validate(tiny_run(router_embedding_size=8), 1)
