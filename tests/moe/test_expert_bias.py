"""The update of the expert bias: the formula, unequal counts, several ranks, and only in training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.distributed import run_ranks
from tests.helpers.models import assemble, shards
from tests.helpers.tiny import data_flags, tiny_run

RATE = 0.125  # A power of two: sums of a few of them are exact.
FLAGS = {
    "moe_router_enable_expert_bias": True,
    "moe_router_score_function": "sigmoid",
    "moe_router_topk": 2,
    "moe_router_bias_update_rate": RATE,
    "clip_grad": 0.0,
}


class Router(torch.nn.Module):
    """What the update sees of a router."""

    def __init__(self, load: list[float]) -> None:
        super().__init__()
        self.register_buffer("expert_bias", torch.zeros(len(load)))
        self.register_buffer("local_tokens_per_expert", torch.tensor(load))


class Settings:
    moe_router_bias_update_rate = RATE


def chunk(*loads: list[float]) -> torch.nn.Module:
    return torch.nn.ModuleList([Router(load) for load in loads])


def update(function_name: str, loads: list[list[float]], training: bool) -> list[list[float]] | str:
    """Biases after one update by our function or upstream's."""
    import importlib

    from megatron_moe.moe import expert_bias
    from megatron_moe.runtime.distributed import start

    start(tiny_run().parallel)
    upstream = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    function = {"ours": expert_bias.update_expert_bias, "upstream": upstream._update_router_expert_bias}[function_name]
    model = chunk(*loads).train(training)
    try:
        function([model], Settings)
    except RuntimeError as error:
        return str(error)
    return [router.expert_bias.tolist() for router in model]


UNEQUAL = [[9.0, 1.0, 5.0, 5.0], [3.0, 5.0], [0.0, 20.0, 0.0, 0.0]]


def test_update_equals_the_formula() -> None:
    """Down by the rate above the mean load, up below it, and still at it."""
    assert run_ranks(1, update, "ours", UNEQUAL, True)[0] == [
        [-RATE, RATE, 0.0, 0.0],
        [RATE, -RATE],
        [RATE, -RATE, RATE, RATE],
    ]


def test_equal_counts_give_what_upstream_gives() -> None:
    loads = [UNEQUAL[0], UNEQUAL[2]]
    assert run_ranks(1, update, "ours", loads, True) == run_ranks(1, update, "upstream", loads, True)


def test_upstream_cannot_do_unequal_counts() -> None:
    """If this fails, upstream has learned it: `megatron_moe/moe/expert_bias.py` may go."""
    message = run_ranks(1, update, "upstream", UNEQUAL, True)[0]
    assert isinstance(message, str)
    assert "stack" in message


def test_no_update_in_evaluation() -> None:
    assert run_ranks(1, update, "ours", UNEQUAL, False)[0] == [[0.0] * 4, [0.0] * 2, [0.0] * 4]


def train(run: Any, steps: int) -> dict[str, Any]:
    """Loads of every step, and the biases after the last, of a real run that evaluates as well."""
    from megatron_moe.moe.layout import expert_layout
    from megatron_moe.moe.metrics import collect_loads
    from megatron_moe.runtime.distributed import start
    from megatron_moe.training.loop import Trainer
    from megatron_moe.training.step import evaluate, train_step

    trainer = Trainer.build(run, start(run.parallel, run.virtual_stages))
    batches = trainer._training_batches()
    layout = expert_layout(trainer.run)
    loads, losses = [], []
    for _ in range(steps):
        count = trainer.schedule.micro_batches(0)
        losses.append(train_step(trainer.run, trainer.model, trainer.optimizer, batches, count).loss)
        loads.append([load.tokens for load in collect_loads(trainer.model, layout.experts_per_layer)])
        evaluate(trainer.run, trainer.model, trainer._training_batches(), 1, 1)
    biases = [shard for shard in shards(trainer.model) if shard.key.endswith("expert_bias")]
    return {"loads": loads, "losses": losses, "biases": biases}


def biases_of(results: list[dict[str, Any]]) -> list[np.ndarray]:
    whole = assemble([result["biases"] for result in results])
    return [whole[key] for key in sorted(whole)]


@pytest.fixture(scope="module")
def one_process(tiny_data: Path) -> dict[str, Any]:
    return run_ranks(1, train, tiny_run(**data_flags(tiny_data), **FLAGS), 3)[0]


def test_biases_of_a_run_follow_its_loads(one_process: dict[str, Any]) -> None:
    """Layers of 4 and 8 experts; a step has four micro-batches, and evaluation changes nothing."""
    expected = [np.zeros(4), np.zeros(8)]
    for step in one_process["loads"]:
        for bias, tokens in zip(expected, step, strict=True):
            bias += RATE * np.sign(np.mean(tokens) - np.array(tokens))
    for ours, theirs in zip(biases_of([one_process]), expected, strict=True):
        np.testing.assert_array_equal(ours.reshape(-1), theirs)
        assert theirs.any()


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        (2, {}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"expert_model_parallel_size": 2}),
    ],
    ids=["data 2", "tensor 2", "pipeline 2", "expert 2"],
)
def test_ranks_agree_with_one_process(
    world_size: int, sizes: dict[str, int], tiny_data: Path, one_process: dict[str, Any]
) -> None:
    results = run_ranks(world_size, train, tiny_run(**data_flags(tiny_data), **FLAGS, **sizes), 3)
    for ours, theirs in zip(biases_of(results), biases_of([one_process]), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for result in results:
        assert result["losses"] == pytest.approx(one_process["losses"], rel=2e-5)
        assert result["loads"] == one_process["loads"]


def test_bias_stays_fp32_in_a_bf16_model(tiny_data: Path) -> None:
    """In bf16 a bias of 1 could not move by 1e-3."""
    assert run_ranks(1, bias_dtypes)[0] == ["torch.float32"] * 4


def bias_dtypes() -> list[str]:
    from megatron_moe.moe.layer import moe_layers
    from tests.helpers.models import start_model

    flags = FLAGS | {"vocab_size": 100, "bf16": True}
    (model,) = start_model(tiny_run(**flags))
    tokens = torch.zeros(1, 32, dtype=torch.long)
    model.train()(tokens, torch.arange(32)[None], None, labels=tokens)
    layers = moe_layers(model)
    return [str(layer.router.expert_bias.dtype) for layer in layers] + [
        str(layer.router.load_counters.dtype) for layer in layers
    ]
