"""`hash`: experts by token id. Against loops, under layouts, and from a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_moe.config.base import ConfigError
from megatron_moe.config.validate import validate
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.equivalence import SMOOTH_ADAM
from tests.helpers.experts import by_expert, naive_mlp
from tests.helpers.experts import expert as expert_of_layer
from tests.helpers.models import Trained, assemble, assert_close, shards, start_model, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import build_trainer, record_curve, train_curve

FLAGS: dict[str, Any] = SMOOTH_ADAM | {"router": "hash", "moe_router_topk": 2}


def layer_and_loops(topk: int, dispatcher: str) -> dict[str, float]:
    """Output, gradients and load of an MoE layer, and the largest distance of each from plain loops."""
    from megatron_moe.moe.inputs import pack_inputs
    from megatron_moe.moe.layer import moe_layers

    run = tiny_run(
        router="hash", moe_router_topk=topk, vocab_size=100, mlp_type="standard", moe_token_dispatcher_type=dispatcher
    )
    (model,) = start_model(run, perturbed=True)
    layer = moe_layers(model)[1]
    torch.manual_seed(0)
    tokens_BS = torch.randint(0, 100, (3, 8))
    hidden = torch.randn(8, 3, 32, requires_grad=True)
    upstream = torch.randn(8, 3, 32)
    output, _ = layer(hidden, padding_mask=pack_inputs(tokens_BS, torch.arange(3)))
    (output * upstream).sum().backward()
    gradients = by_expert({name: p.grad.clone() for name, p in layer.named_parameters()})
    hidden_grad = hidden.grad.clone()
    load = layer.router.take_load()
    # The loops.
    layer.zero_grad()
    again = hidden.detach().clone().requires_grad_()
    expected = torch.zeros_like(again)
    counted = torch.zeros(8)
    for place in range(8):
        for row in range(3):
            for expert in layer.router.token_map[tokens_BS[row, place]].tolist():
                counted[expert] += 1
                one = naive_mlp(expert_of_layer(layer.experts, expert), again[place, row])
                share = torch.zeros_like(again)
                share[place, row] = 1
                expected = expected + share * one / topk
    (expected * upstream).sum().backward()
    return {
        "output": float((output - expected).detach().abs().max()),
        "hidden": float((hidden_grad - again.grad).abs().max()),
        **{
            name: float((gradients[name] - gradient).abs().max())
            for name, gradient in by_expert({name: p.grad for name, p in layer.named_parameters()}).items()
        },
        "load": float((load[:-2] - counted).abs().max()),
        "not made": float(load[-2:].sum()),
        "parameters of the router": float(sum(p.numel() for p in layer.router.parameters())),
        "size": float(-expected.detach().abs().max()),
    }


@pytest.mark.parametrize(("topk", "dispatcher"), [(1, "alltoall"), (3, "allgather")])
def test_a_layer_equals_loops(topk: int, dispatcher: str) -> None:
    (found,) = run_ranks(1, layer_and_loops, topk, dispatcher)
    assert found.pop("size") < -0.1
    assert len(found) > 20, "gradients of all experts are compared"
    for name, distance in found.items():
        assert distance < 1e-5, name


@pytest.fixture(scope="module")
def one_process(tiny_data: Path) -> Trained:
    return run_ranks(1, train_and_gather, tiny_run(**data_flags(tiny_data), **FLAGS))[0]


def test_a_layout_equals_one_process(one_process: Trained, tiny_data: Path) -> None:
    """Token ids reach the second stage, the ranks of a sequence that is divided, and recomputed layers."""
    sizes = {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "recompute_granularity": "full",
        "recompute_method": "uniform",
    }
    results = run_ranks(4, train_and_gather, tiny_run(**data_flags(tiny_data), **FLAGS, **sizes))
    assert results[0].loads == one_process.loads
    assert results[0].losses == pytest.approx(one_process.losses, rel=2e-6)
    # Sums over ranks in another order, three steps long.
    assert_close(assemble([result.gradients for result in results]), assemble([one_process.gradients]), relative=5e-5)


def maps_of(run: Any) -> dict[int, Any]:
    from megatron_moe.moe.layer import moe_layers

    return {
        layer.layer_number: layer.router.token_map.numpy() for chunk in start_model(run) for layer in moe_layers(chunk)
    }


def test_maps_are_those_of_seed_and_layer() -> None:
    flags = {"router": "hash", "vocab_size": 300, "num_experts": (8,), "expert_interval": 1}
    (one,) = run_ranks(1, maps_of, tiny_run(**flags))
    sizes = {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}
    spread = run_ranks(4, maps_of, tiny_run(**flags, **sizes))
    assert {number for part in spread for number in part} == set(one) == {1, 2, 3, 4}
    for part in spread:
        for number, table in part.items():
            np.testing.assert_array_equal(table, one[number])
    assert len({table.tobytes() for table in one.values()}) == 4, "every layer has its own"
    (other,) = run_ranks(1, maps_of, tiny_run(**flags, seed=5))
    assert (other[1] == one[1]).mean() < 0.25


def resume_in_bf16(run: Any) -> tuple[list[float], list[Any], list[float]]:
    """Train on, with a router that would draw another map if it drew one."""
    from megatron_moe.moe.routers.hash import HashRouter

    HashRouter.draw = _refuse
    trainer = build_trainer(run)
    curve = record_curve(trainer)
    return curve.losses, shards(trainer.model), [float(layer) for layer in curve.grad_norms]


def _refuse(*_: Any) -> Any:
    raise AssertionError("a map is drawn when a run starts, and never again")


def test_a_resumed_run_takes_its_maps_from_the_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    """Balanced by counts, in bf16; the file of counts is gone when the run goes on, and the layout is another."""
    counts = tmp_path / "counts.npy"
    np.save(counts, np.arange(1, 861)[::-1])
    flags = (
        data_flags(tiny_data)
        | FLAGS
        | {
            "router_map": "balanced",
            "router_token_counts": str(counts),
            "bf16": True,
            "save": str(tmp_path / "run"),
            "save_interval": 2,
        }
    )
    (whole,) = run_ranks(1, train_curve, tiny_run(**flags, train_iters=4))
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2\n")
    counts.unlink()
    again = tiny_run(**flags, train_iters=4, load=str(tmp_path / "run"))
    (resumed,) = run_ranks(1, resume_in_bf16, again)
    assert resumed[0] == whole.losses[2:]
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("2\n")
    spread = tiny_run(**flags, train_iters=4, load=str(tmp_path / "run"), pipeline_model_parallel_size=2)
    # bf16 rounds activations to 3 digits, in another order.
    assert run_ranks(2, resume_in_bf16, spread)[0][0] == pytest.approx(whole.losses[2:], rel=2e-3)


def test_what_it_cannot_do_is_refused(tiny_data: Path) -> None:
    for flags, problem in (
        ({"moe_aux_loss_coeff": 0.1}, "--moe-aux-loss-coeff 0.1: has no meaning for --router hash"),
        ({"moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor 1.0: has no meaning for --router hash"),
        ({"num_domains": 2}, "--num-domains 2: needs --router random-routed or --domain-embedding"),
    ):
        with pytest.raises(ConfigError, match=problem):
            validate(tiny_run(router="hash", **flags), 1)
    with pytest.raises(ConfigError, match="--router-token-counts counts: needs --router-map balanced"):
        tiny_run(router="hash", router_token_counts="counts")
    run = tiny_run(router="hash", router_map="balanced", vocab_size=100)
    with pytest.raises(ConfigError, match="--router-map balanced: needs --router-token-counts"):
        validate(run, 1)
    validate(tiny_run(router="hash", router_map="balanced", vocab_size=100, load="runs/hash"), 1)
    with pytest.raises(RankFailure, match="--router-map balanced: needs --router-token-counts"):
        run_ranks(1, maps_of, dataclasses.replace(run))
