"""Cross-layer attention: against plain torch, under every layout and recompute, in checkpoints, and with a cache."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import parse_run
from megatron_moe.config.validate import validate
from megatron_moe.model.flops import forward_flops_per_token
from megatron_moe.model.kv_cache import kv_cache_bytes_per_token
from megatron_moe.model.parameters import count_parameters
from tests.helpers.checkpoints import whole_tensors
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, assert_close, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve
from tests.inference.on_ranks import GREEDY, cache_error, greedy_ways, load, prompts_of
from tests.model.test_weight_reuse import DENSE, LAYOUTS, MODERN, RECOMPUTE, recomputed

CLA: dict[str, Any] = {"cla_share_factor": 2}


def errors_against_plain(runs: list[Any]) -> list[tuple[float, float]]:
    """Of every run: error, and error of a reference whose cross layers use the first layer's keys and values."""
    from megatron_moe.config.attention import source_layer
    from megatron_moe.model.gpt import build_model
    from tests.helpers.models import perturb, start_model
    from tests.helpers.plain_gpt import largest_error, losses_and_gradients, model_losses, plain_losses, tokens

    start_model(runs[0])
    results = []
    for run in runs:
        (chunk,) = build_model(run)
        perturb([chunk])
        batch = tokens(run)
        actual = losses_and_gradients(chunk.train(), model_losses(chunk, batch))
        sources = [source_layer(layer + 1, run.model.cla_share_factor) - 1 for layer in range(run.model.num_layers)]
        first = [source if source == layer else 0 for layer, source in enumerate(sources)]
        errors = [
            largest_error(actual, losses_and_gradients(chunk, plain_losses(chunk, run, *batch[:2], sources=places)))
            for places in (sources, first)
        ]
        results.append((errors[0], errors[1]))
    return results


def test_equals_a_plain_loop() -> None:
    """Outputs and gradients: MHA with biases, and GQA with RoPE and norms of each layer's own."""
    runs = [
        tiny_run(**DENSE, **CLA),
        tiny_run(**DENSE, **CLA, **MODERN),
        tiny_run(**DENSE, **MODERN, cla_share_factor=3, num_layers=5, add_qkv_bias=True, disable_bias_linear=True),
    ]
    for error, wrong in run_ranks(1, errors_against_plain, runs)[0]:
        # fp32 sums in another order.
        assert error < 2e-5
        assert wrong > 1e-3


def test_recompute_changes_nothing() -> None:
    """To the last bit, with dropout."""
    flags = DENSE | MODERN | CLA | {"num_layers": 4, "attention_dropout": 0.2, "hidden_dropout": 0.1}
    expected, *others = run_ranks(1, recomputed, [tiny_run(**flags, **mode) for mode in RECOMPUTE])[0]
    for mode, tensors in zip(RECOMPUTE[1:], others, strict=True):
        assert all((a == b).all() for a, b in zip(tensors, expected, strict=True)), mode


@pytest.fixture(scope="module")
def cla_flags(tiny_data: Path) -> dict[str, Any]:
    more = {"num_layers": 8, "num_experts": (4, 4, 8, 8), "clip_grad": 0.0, "init_method_std": 0.4}
    return data_flags(tiny_data) | MODERN | CLA | more | {"max_position_embeddings": 48, "tensorboard": False}


@pytest.fixture(scope="module")
def one_process(cla_flags: dict[str, Any]) -> Trained:
    return run_ranks(1, train_and_gather, tiny_run(**cla_flags))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, cla_flags: dict[str, Any], one_process: Trained) -> None:
    """Losses of all steps, and the last step's gradients."""
    world_size, flags = LAYOUTS[layout]
    ranks = run_ranks(world_size, train_and_gather, tiny_run(**cla_flags, **flags))
    assert ranks[-1].losses == pytest.approx(one_process.losses, rel=2e-6)
    # fp32 over three steps of Adam, whose first steps turn a gradient's last bits into weights.
    assert_close(assemble([rank.gradients for rank in ranks]), assemble([one_process.gradients]), 1e-4)


@pytest.fixture(scope="module")
def saved(cla_flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a checkpoint after two steps, in bf16; four layers share."""
    folder = tmp_path_factory.mktemp("cla")
    flags = cla_flags | {"train_iters": 2, "bf16": True, "cla_share_factor": 4, "save": str(folder)}
    run_ranks(1, train_curve, tiny_run(**flags))
    return folder


def test_checkpoint_holds_queries_only_of_cross_layers(saved: Path) -> None:
    tensors = run_ranks(1, attention_shapes, saved)[0]
    own = {"linear_qkv.weight": (64, 32), "linear_proj.weight": (32, 32), "linear_qkv.bias": (64,)}
    cross = {"linear_q.weight": (32, 32), "linear_proj.weight": (32, 32), "linear_q.bias": (32,)}
    both = {"linear_proj.bias": (32,), "q_layernorm.weight": (8,), "k_layernorm.weight": (8,)}
    for layer, shapes in tensors.items():
        assert shapes == (own if layer in (0, 4) else cross) | both
    assert sorted(tensors) == list(range(8))


def attention_shapes(folder: Path) -> dict[int, dict[str, tuple[int, ...]]]:
    """By layer, counted from 0, of the model's own tensors."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for key, tensor in whole_tensors(folder).items():
        if key.startswith("decoder.layers.") and ".self_attention." in key:
            layer, _, name = key.removeprefix("decoder.layers.").partition(".self_attention.")
            found.setdefault(int(layer), {})[name] = tuple(tensor.shape)
    return found


def outputs_under(folder: Path, sizes: dict[str, int]) -> tuple[list[Any], list[Any]]:
    """Logits, and greedy continuations with a cache."""
    from megatron_moe.inference.generation import generate

    model = load(folder, sizes, eval_fp32=True)
    return model.logits([[5, 6, 7, 8, 9, 10]]).tolist(), generate(model, prompts_of(model), GREEDY, max_new_tokens=6)


def test_checkpoint_is_read_under_another_layout(saved: Path) -> None:
    """Logits and texts of TP 2 x PP 2 against one process."""
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    (whole, texts), (split, texts_split) = (
        run_ranks(ranks, outputs_under, saved, sizes if ranks > 1 else {})[0] for ranks in (1, 4)
    )
    assert texts_split == texts
    for a, b in zip(whole[0], split[0], strict=True):
        assert a == pytest.approx(b, abs=2e-4)


def test_cached_text_equals_uncached(saved: Path) -> None:
    """Logits over a text with a cache, and greedy continuations in every way."""
    (errors, ways) = run_ranks(1, cached, saved)[0]
    assert errors[0] < 2e-5 * errors[1]
    assert len({str(texts) for texts in ways.values()}) == 1
    assert len({token for ids in ways["plain"] for token in ids}) > 2


def cached(folder: Path) -> tuple[tuple[float, float], dict[str, list[list[int]]]]:
    from tests.inference import on_ranks

    # The helpers load the run as it was trained; the comparison is one of fp32.
    original = on_ranks.load
    on_ranks.load = lambda run_dir: original(run_dir, eval_fp32=True)  # type: ignore[assignment]
    return cache_error(folder), greedy_ways(folder)


# Hunyuan-Large's attention, with a hidden size that a test can afford.
HUNYUAN = (
    "--device cpu --num-layers 64 --hidden-size 16 --ffn-hidden-size 16 --num-attention-heads 80 --kv-channels 80 "
    "--position-embedding-type rope --qk-layernorm --normalization RMSNorm --seq-length 8 --vocab-size 100 "
    "--train-iters 1 --bf16 --disable-bias-linear "
)
# arXiv 2411.02265, table 1: bytes of a token. Of what a model keeps in bf16, the share of multi-head attention.
PUBLISHED = {
    "MHA": ("", 1_638_400),
    "GQA": ("--num-query-groups 8", 163_840),
    "MQA": ("--num-query-groups 1", 20_480),
    "CLA": ("--cla-share-factor 2", 819_200),
    "GQA + CLA": ("--num-query-groups 8 --cla-share-factor 2", 81_920),
}


def allocated_bytes(runs: list[Any]) -> list[int]:
    """What a cache with room for one token takes in memory once the model has filled it."""
    import torch
    from megatron.core.inference.contexts import StaticInferenceContext

    from megatron_moe.model.gpt import build_model
    from tests.helpers.models import start_model

    start_model(runs[0], inference=True)
    totals = []
    for run in runs:
        (chunk,) = build_model(run, inference=True, initialize=False)
        context = StaticInferenceContext(max_batch_size=1, max_sequence_length=1)
        one = torch.zeros(1, 1, dtype=torch.long)
        with torch.no_grad():
            chunk.eval()(one, one, None, inference_context=context, runtime_gather_output=True)
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for pair in context.key_value_memory_dict.values()
            for tensor in pair
        }
        totals.append(sum(storages.values()))
    return totals


def test_cache_of_hunyuan_large_shrinks_to_what_is_published() -> None:
    """Counted from the flags, and in memory that was really allocated: 5 % of multi-head attention's."""
    runs = {
        name: parse_run((HUNYUAN + words).split(), prog="pretrain", description="")[0]
        for name, (words, _) in PUBLISHED.items()
    }
    published = {name: size for name, (_, size) in PUBLISHED.items()}
    assert {name: kv_cache_bytes_per_token(run) for name, run in runs.items()} == published
    allocated = run_ranks(1, allocated_bytes, list(runs.values()))[0]
    assert dict(zip(runs, allocated, strict=True)) == published
    assert published["GQA + CLA"] / published["MHA"] == 0.05


def test_counts() -> None:
    """Two of four layers do without keys and values: 2 x 2 heads of 8 channels, with biases."""
    off, on = (tiny_run(**DENSE, num_query_groups=2, cla_share_factor=factor) for factor in (1, 2))
    assert count_parameters(off).attention - count_parameters(on).attention == 2 * (32 + 1) * 32
    assert forward_flops_per_token(off) - forward_flops_per_token(on) == 2 * 2 * 32 * 32


BASE = "--num-layers 8 --vocab-size 100 --train-iters 9 "


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        ("--cla-share-factor 3 --pipeline-model-parallel-size 2", 2, "must divide the 4 layers of a pipeline stage"),
        (
            "--cla-share-factor 4 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 2",
            2,
            "must divide the 2 layers of a virtual pipeline stage",
        ),
        ("--cla-share-factor 9", 1, "--cla-share-factor 9: must be at most --num-layers 8"),
        ("--cla-share-factor 0", 1, "--cla-share-factor 0: must be"),
        (
            "--cla-share-factor 2 --transformer-impl transformer_engine",
            1,
            "--cla-share-factor 2: needs --transformer-i",
        ),
    ],
)
def test_what_cannot_work_is_refused(words: str, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(parse_run((BASE + words).split(), prog="pretrain", description="")[0], world_size)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_upstream_attention_still_takes_the_two_steps_apart() -> None:
    """What `model/cross_layer_attention.py` overrides, in the order it needs."""
    from megatron.core.transformer.attention import Attention

    source = inspect.getsource(Attention.forward)
    places = [source.find(f"{name}(") for name in ("get_query_key_value_tensors", "_adjust_key_value_for_inference")]
    rotates = source.find("apply_rotary_pos_emb(")
    message = "megatron-core's Attention.forward no longer projects, adjusts for the cache and rotates in this order"
    assert 0 < places[0] < places[1] < rotates, message
    cache = inspect.getsource(Attention._adjust_key_value_for_inference)
    assert "if self.layer_number not in inference_context.key_value_memory_dict" in cache, (
        "megatron-core's Attention allocates its cache in another way; cross layers would have their own"
    )
