"""Attention weights taken over from the layer before: against plain torch, under every layout, recompute and resume."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.attention import computed_share
from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import parse_run
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.validate import validate
from megatron_moe.inference.options import LoadOptions
from megatron_moe.inference.saved_model import open_checkpoint
from megatron_moe.model.flops import forward_flops_per_token, training_flops_per_token
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, assert_close, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve

PROB, SPAN = "attention_weight_reuse_prob", "attention_weight_reuse_span"
DENSE: dict[str, Any] = {"num_experts": None, "expert_interval": 1, "mlp_type": "standard", "vocab_size": 100}
DEEP: dict[str, Any] = {"num_layers": 8, "num_experts": (4, 4, 8, 8)}
MODERN: dict[str, Any] = {
    "num_query_groups": 2,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "qk_layernorm": True,
}


def pattern(run: Any, step: int, sample: int) -> list[bool]:
    """Which layers compute."""
    from megatron_moe.model.weight_reuse import computes_weights

    model = run.model
    options = {"prob": model.attention_weight_reuse_prob, "span": model.attention_weight_reuse_span or model.num_layers}
    return [
        computes_weights(layer, seed=run.training.seed, step=step, sample=sample, **options)
        for layer in range(1, model.num_layers + 1)
    ]


@pytest.mark.parametrize(("prob", "span"), [(0.5, None), (0.25, 4), (0.0, 3), (1.0, None)])
def test_share_of_computed_layers(prob: float, span: int | None) -> None:
    run = tiny_run(**{PROB: prob, SPAN: span}, num_layers=12)
    patterns = [pattern(run, step, sample) for step in range(60) for sample in range(0, 40, 2)]
    share = sum(map(sum, patterns)) / (12 * len(patterns))
    # Four standard deviations of as many free draws; none where nothing is left to chance.
    deviation = (prob * (1 - prob) / (12 * len(patterns))) ** 0.5
    assert abs(share - computed_share(run.model)) <= 4 * deviation
    length = span or 12
    if 12 % length == 0:
        assert computed_share(run.model) == pytest.approx((1 + (length - 1) * prob) / length)


def test_draws_differ_by_step_layer_and_sample() -> None:
    run = tiny_run(**{PROB: 0.5}, num_layers=40)
    by_step = {tuple(pattern(run, step, 0)) for step in range(20)}
    by_sample = {tuple(pattern(run, 0, sample)) for sample in range(20)}
    assert len(by_step) == len(by_sample) == 20
    assert pattern(run, 3, 4) == pattern(run, 3, 4)
    assert 8 < sum(pattern(run, 0, 0)) < 32


def errors_against_plain(runs: list[Any], steps: int) -> list[tuple[list[bool], float, float, float]]:
    """Of every run and step: which layers compute, error in training, in evaluation, and without reuse."""
    from megatron_moe.model.gpt import build_model
    from tests.helpers.models import perturb, start_model
    from tests.helpers.plain_gpt import largest_error, losses_and_gradients, model_losses, plain_losses, tokens

    start_model(runs[0])
    results = []
    for run in runs:
        (chunk,) = build_model(run)
        perturb([chunk])
        for step in range(steps):
            for layer in chunk.decoder.layers:
                layer.begin_step(step)
            batch, computes = tokens(run, seed=step), pattern(run, step, 10 * step)
            chunk.train()
            trained = losses_and_gradients(chunk, model_losses(chunk, batch))
            chunk.eval()
            evaluated = losses_and_gradients(chunk, model_losses(chunk, batch))
            reused = losses_and_gradients(chunk, plain_losses(chunk, run, *batch[:2], computes=computes))
            never = losses_and_gradients(chunk, plain_losses(chunk, run, *batch[:2]))
            errors = [largest_error(a, b) for a, b in ((trained, reused), (evaluated, never), (trained, never))]
            results.append((computes, *errors))
    return results


def test_equals_a_plain_loop() -> None:
    """Outputs and gradients, chains of copies among them; evaluation computes everywhere."""
    runs = [
        tiny_run(**DENSE, **MODERN, **{PROB: 0.4}, num_layers=5),
        tiny_run(**DENSE, **{PROB: 0.0, SPAN: 3}, num_layers=5),
    ]
    results = run_ranks(1, errors_against_plain, runs, 4)[0]
    for computes, trained, evaluated, without in results:
        # fp32 sums in another order.
        assert trained < 2e-5
        assert evaluated < 2e-5
        assert all(computes) or without > 1e-3
    patterns = [computes for computes, *_ in results[:4]]
    assert any((a, b, c) == (True, False, False) for p in patterns for a, b, c in zip(p, p[1:], p[2:], strict=False))
    assert results[4][0] == [True, False, False, True, False]


def recomputed(runs: list[Any]) -> list[list[Any]]:
    """Losses and gradients of every run with dropout, from the same generator state."""
    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime.seeds import set_seeds
    from tests.helpers.models import perturb, start_model
    from tests.helpers.plain_gpt import model_losses, tokens

    start_model(runs[0])
    results = []
    for run in runs:
        (chunk,) = build_model(run)
        perturb([chunk])
        chunk.train()
        set_seeds(5)
        # `.backward()`: re-entrant checkpoints refuse `autograd.grad`.
        losses = model_losses(chunk, tokens(run))
        losses.mean().backward()
        results.append([losses.detach().numpy(), *(parameter.grad.numpy() for parameter in chunk.parameters())])
    return results


RECOMPUTE: list[dict[str, Any]] = [
    {},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
    {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
    {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")},
]


def test_recompute_changes_nothing() -> None:
    """To the last bit, with dropout."""
    flags = DENSE | MODERN | {PROB: 0.0, "num_layers": 4, "attention_dropout": 0.2, "hidden_dropout": 0.1}
    expected, *others = run_ranks(1, recomputed, [tiny_run(**flags, **mode) for mode in RECOMPUTE])[0]
    for mode, tensors in zip(RECOMPUTE[1:], others, strict=True):
        assert all((a == b).all() for a, b in zip(tensors, expected, strict=True)), mode


def test_with_every_layer_computing_nothing_changes(tiny_data: Path) -> None:
    """Bit for bit over training steps: the probability misses 1 by less than any draw does."""
    flags = data_flags(tiny_data) | {"attention_dropout": 0.1, "hidden_dropout": 0.1}
    off, on = (run_ranks(1, train_curve, tiny_run(**flags, **reuse))[0] for reuse in ({}, {PROB: 1.0 - 1e-12}))
    assert on.losses == off.losses
    assert on.grad_norms == off.grad_norms


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 2, interleaved PP 2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "num_layers_per_virtual_pipeline_stage": 2,
        },
    ),
    "CP 2, EP 2, overlapped ZeRO-1": (
        4,
        {
            "context_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 2,
        },
    ),
}


@pytest.fixture(scope="module")
def reuse_flags(tiny_data: Path) -> dict[str, Any]:
    return data_flags(tiny_data) | MODERN | {PROB: 0.5, SPAN: 2, "clip_grad": 0.0, **DEEP}


@pytest.fixture(scope="module")
def one_process(reuse_flags: dict[str, Any]) -> Trained:
    return run_ranks(1, train_and_gather, tiny_run(**reuse_flags))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, reuse_flags: dict[str, Any], one_process: Trained) -> None:
    """Losses of all steps, and the last step's gradients."""
    world_size, flags = LAYOUTS[layout]
    ranks = run_ranks(world_size, train_and_gather, tiny_run(**reuse_flags, **flags))
    assert ranks[-1].losses == pytest.approx(one_process.losses, rel=2e-6)
    # fp32 over three steps of Adam, whose first steps turn a gradient's last bits into weights.
    assert_close(assemble([rank.gradients for rank in ranks]), assemble([one_process.gradients]), 1e-4)


def test_bf16_learns_alike(reuse_flags: dict[str, Any], one_process: Trained) -> None:
    """bf16 keeps 8 bits of every weight and activation."""
    half = run_ranks(1, train_and_gather, tiny_run(**reuse_flags, bf16=True))[0]
    assert half.losses == pytest.approx(one_process.losses, rel=1e-2)


def test_resumed_run_draws_what_it_would_have_drawn(tiny_data: Path, tmp_path: Path) -> None:
    flags = data_flags(tiny_data) | {PROB: 0.5, "tensorboard": False, **DEEP}
    whole = run_ranks(1, train_curve, tiny_run(**flags))[0]
    run_ranks(1, train_curve, tiny_run(**flags | {"train_iters": 1}, save=str(tmp_path)))
    rest = run_ranks(1, train_curve, tiny_run(**flags, load=str(tmp_path)))[0]
    assert rest.losses == whole.losses[1:]
    assert rest.grad_norms == whole.grad_norms[1:]
    # Stages that training could not have: inference computes everywhere.
    split = ParallelConfig(device="cpu", pipeline_model_parallel_size=2)
    opened = open_checkpoint(LoadOptions(load=str(tmp_path)), split, world_size=2)
    assert opened.run.model.attention_weight_reuse_prob == 1.0


def flops_of_roles(run: Any) -> dict[str, int]:
    """Of one attention's forward pass, counted by torch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tests.helpers.models import start_model

    (chunk,) = start_model(run)
    attention = chunk.decoder.layers[1].self_attention.train()
    x = torch.randn(run.model.seq_length, 1, run.model.hidden_size)
    counts = {}
    # The copy finds what the source leaves.
    for role in ("source", "copy"):
        attention.role = role
        with FlopCounterMode(display=False) as counter:
            attention(x, None)
        counts[role] = counter.get_total_flops()
    return counts


def test_copy_computes_neither_queries_nor_keys_nor_their_product() -> None:
    run = tiny_run(**DENSE, **{PROB: 0.5}, num_query_groups=2)
    counts = run_ranks(1, flops_of_roles, run)[0]
    length, hidden, heads, groups, width = 32, 32, 4, 2, 8
    projections = 2 * length * hidden * width * (heads + groups)
    product = 2 * heads * length * length * width
    assert counts["source"] - counts["copy"] == projections + product


def test_reported_flops() -> None:
    off, on = tiny_run(vocab_size=100), tiny_run(vocab_size=100, **{PROB: 0.0, SPAN: 2})
    assert forward_flops_per_token(on) == forward_flops_per_token(off)
    # Two of four layers are spared queries and keys of 32 channels each, and half of a product with 32 keys.
    spared = 2 * (2 * 32 * (32 + 32) + 2 * 32 * 32 / 2)
    assert training_flops_per_token(off) - training_flops_per_token(on) == 3 * spared


BASE = "--num-layers 8 --vocab-size 100 --train-iters 9 --attention-weight-reuse-prob 0.5 "
PP2 = "--pipeline-model-parallel-size 2 "


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (BASE + PP2, 2, "--attention-weight-reuse-prob 0.5: weights are not sent between pipeline stages; "),
        (BASE + PP2 + "--attention-weight-reuse-span 3", 2, "-span must divide the 4 layers of a pipeline stage"),
        (
            BASE + PP2 + "--attention-weight-reuse-span 4 --num-layers-per-virtual-pipeline-stage 2",
            2,
            "must divide the 2 layers of a virtual pipeline stage",
        ),
        (BASE + "--attention-weight-reuse-span 1", 1, "--attention-weight-reuse-span 1: must be at least 2"),
        (BASE + "--attention-backend unfused", 1, "needs --transformer-impl local and --attention-backend sdpa"),
        (BASE + "--transformer-impl transformer_engine", 1, "--attention-weight-reuse-prob 0.5: needs --transformer-"),
        (BASE + "--cla-share-factor 2", 1, "--attention-weight-reuse-prob 0.5: must be 1 with --cla-share-factor 2"),
        (
            "--vocab-size 9 --train-iters 9 --attention-weight-reuse-span 2",
            1,
            "--attention-weight-reuse-span 2: needs --attention-weight-reuse-prob less than 1",
        ),
        (BASE + "--attention-weight-reuse-prob 1.5", 1, "--attention-weight-reuse-prob 1.5: must be in [0, 1]"),
    ],
)
def test_what_cannot_work_is_refused(words: str, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(parse_run(words.split(), prog="pretrain", description="")[0], world_size)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_span_within_stages_is_legal() -> None:
    words = BASE + PP2 + "--attention-weight-reuse-span 2 --num-layers-per-virtual-pipeline-stage 2"
    validate(parse_run([*words.split(), "--global-batch-size", "4"], prog="pretrain", description="")[0], 2)


def test_upstream_still_hands_context_from_layer_to_layer() -> None:
    """What `model/layer.py` relies on."""
    from megatron.core import recompute
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_layer import TransformerLayer

    moved = "megatron-core no longer passes `context` from layer to layer as model/layer.py needs it: "
    for function in (recompute.checkpointed_forward, TransformerBlock.forward):
        source = inspect.getsource(function)
        assert "hidden_states, context = layer(" in source, moved + function.__qualname__
        assert "context=context" in source, moved + function.__qualname__
    assert "return output, context" in inspect.getsource(TransformerLayer.forward), moved + "TransformerLayer.forward"
    parameters = inspect.signature(TransformerLayer._forward_attention).parameters
    assert {"context", "padding_mask"} <= set(parameters), moved + "TransformerLayer._forward_attention"


def test_upstream_attention_has_what_is_taken_from_it() -> None:
    """What `model/weight_reuse.py` takes from upstream's attention, by name."""
    from megatron.core.transformer.attention import SelfAttention

    source = "".join(inspect.getsource(cls) for cls in SelfAttention.__mro__[:2])
    for name in ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm"):
        assert f"self.{name} = " in source, f"megatron-core's SelfAttention has no {name}"
    for name in ("checkpoint_core_attention", "num_query_groups_per_partition", "hidden_size_per_attention_head"):
        assert f"self.{name} = " in source, f"megatron-core's SelfAttention has no {name}"
