"""Multi-latent attention: under every layout and recompute, in checkpoints and with a cache. That it is DeepSeek's says
tests/checkpoint/hf/test_deepseek_v3.py."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import parse_run
from megatron_moe.config.validate import validate
from megatron_moe.model.dry_run import report
from megatron_moe.model.flops import forward_flops_per_token
from megatron_moe.model.kv_cache import kv_cache_bytes_per_token
from megatron_moe.model.parameters import attention_size, count_parameters
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Trained, assemble, assert_close, start_model, train_and_gather
from tests.helpers.tiny import data_flags, tiny_run
from tests.inference.conftest import train
from tests.inference.on_ranks import cache_error, greedy_ways
from tests.model.test_weight_reuse import DENSE, recomputed

# No two widths alike.
LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 12,
    "qk_head_dim": 10,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "qk_layernorm": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
}
SHARED = {"disable_bias_linear": True, "moe_shared_expert_intermediate_size": 24, "mlp_type": "standard"}
PLAIN_QUERY = {"q_lora_rank": None}


@pytest.fixture(scope="module")
def flags(tiny_data: Path) -> dict[str, Any]:
    more = {"clip_grad": 0.0, "init_method_std": 0.4, "train_iters": 2, "optimizer": "sgd", "lr": 0.1}
    return data_flags(tiny_data) | LATENT | SHARED | more


@pytest.fixture(scope="module")
def one_process(flags: dict[str, Any]) -> Trained:
    return run_ranks(1, train_and_gather, tiny_run(**flags))[0]


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 2, PP 2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "CP 2, EP 2, recomputed": (
        4,
        {
            "context_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, flags: dict[str, Any], one_process: Trained) -> None:
    """Losses of all steps, and the last step's gradients."""
    world_size, more = LAYOUTS[layout]
    ranks: list[Trained] = run_ranks(world_size, train_and_gather, tiny_run(**flags | more))
    assert ranks[-1].losses == pytest.approx(one_process.losses, rel=2e-6)
    assert ranks[-1].grad_norms == pytest.approx(one_process.grad_norms, rel=1e-5)
    assert_close(assemble([rank.gradients for rank in ranks]), assemble([one_process.gradients]), 5e-5)


def test_dense_models_without_sequence_parallelism_agree(flags: dict[str, Any]) -> None:
    """Where each rank has the whole sequence, the gradients of what is not split must not be summed."""
    dense = flags | DENSE | {"vocab_size": None, "moe_shared_expert_intermediate_size": None}
    one: Trained = run_ranks(1, train_and_gather, tiny_run(**dense))[0]
    two: list[Trained] = run_ranks(2, train_and_gather, tiny_run(**dense, tensor_model_parallel_size=2))
    assert two[0].grad_norms == pytest.approx(one.grad_norms, rel=1e-5)
    assert_close(assemble([rank.gradients for rank in two]), assemble([one.gradients]), 5e-5)


def test_recompute_changes_nothing() -> None:
    """To the last bit, with dropout."""
    mode = {"recompute_granularity": "selective", "recompute_modules": ("core_attn", "mlp")}
    flags = DENSE | LATENT | {"attention_dropout": 0.2, "hidden_dropout": 0.1}
    expected, again = run_ranks(1, recomputed, [tiny_run(**flags), tiny_run(**flags, **mode)])[0]
    assert all((a == b).all() for a, b in zip(again, expected, strict=True))


def test_cached_text_equals_uncached(tmp_path: Path, tiny_data: Path) -> None:
    """Logits over a text with a cache, and greedy continuations in every way; queries have no latent vector, and
    frequencies are stretched. Two ranks wrote the checkpoint."""
    flags = LATENT | PLAIN_QUERY | {"rotary_scaling_factor": 4.0, "original_max_position_embeddings": 16}
    folder = train(tmp_path / "run", tiny_data, 2, **flags, tensor_model_parallel_size=2)
    error, size = run_ranks(1, cache_error, folder)[0]
    assert error < 2e-5 * size
    ways = run_ranks(1, greedy_ways, folder)[0]
    assert len({str(texts) for texts in ways.values()}) == 1


def built_sizes(runs: list[Any]) -> list[tuple[int, int]]:
    """Parameters of the models that are built, and of one layer's attention."""
    from megatron_moe.model.gpt import build_model

    start_model(runs[0])
    found = []
    for run in runs:
        (chunk,) = build_model(run)
        parts = (chunk, chunk.decoder.layers[0].self_attention)
        found.append(tuple(sum(parameter.numel() for parameter in part.parameters()) for part in parts))
    return found


def test_counts() -> None:
    """Of the models that are built; the arithmetic written out for the hidden size 32 and 4 heads."""
    runs = [
        tiny_run(**DENSE | LATENT),
        tiny_run(**DENSE | LATENT | PLAIN_QUERY | {"qk_layernorm": False, "disable_bias_linear": True}),
    ]
    sizes = [(count_parameters(run, padded_vocab=True).total, attention_size(run).total) for run in runs]
    assert run_ranks(1, built_sizes, runs)[0] == sizes
    down, up, out = 32 * (12 + 4), 12 * 4 * (10 + 6), 4 * 6 * 32
    assert sizes[0][1] == down + up + out + 24 * (32 + 4 * 14) + 12 + 24 + 32
    assert sizes[1][1] == down + up + out + 32 * 4 * 14
    assert kv_cache_bytes_per_token(runs[0]) == 4 * 4 * (14 + 6) * 4
    rest = forward_flops_per_token(tiny_run(**DENSE)) - 4 * (2 * 4 * 32 * 32 + 2 * 2 * 32 * 16)
    products = 2 * (down + up + out + 24 * (32 + 4 * 14)) + 2 * 4 * (14 + 6) * 16
    assert forward_flops_per_token(runs[0]) - rest == 4 * products


def test_deepseek_v3_has_the_published_size() -> None:
    """arXiv 2412.19437: 671 B parameters, of which a token passes through 37 B."""
    words = (
        "--multi-latent-attention --q-lora-rank 1536 --qk-layernorm --position-embedding-type rope "
        "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
        "--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 --vocab-size 129280 "
        "--num-experts 256 --moe-first-dense-layers 3 --moe-ffn-hidden-size 2048 --moe-router-topk 8 "
        "--moe-shared-expert-intermediate-size 2048"
    )
    counts = count_parameters(parse_run(words.split(), prog="pretrain", description="")[0])
    assert counts.total // 10**9 == 671
    assert counts.activated // 10**9 == 37


def test_the_dry_run_names_it() -> None:
    text = report(tiny_run(**DENSE | LATENT), 1)
    assert "multi-latent attention: latent of keys and values 12, of queries 24; heads of 10 + 4 rotated" in text


BASE = "--multi-latent-attention --vocab-size 100 --train-iters 9 "
ROPE = "--position-embedding-type rope "


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (BASE, "--multi-latent-attention: needs --position-embedding-type rope"),
        (BASE + ROPE + "--transformer-impl transformer_engine", "needs --transformer-impl local"),
        (BASE + ROPE + "--attention-backend unfused", "needs --attention-backend sdpa"),
        (
            BASE + ROPE + "--num-query-groups 2",
            "--num-query-groups 2: cannot be combined with --multi-latent-attention",
        ),
        (BASE + ROPE + "--kv-channels 8", "--kv-channels 8: cannot be combined"),
        (BASE + ROPE + "--cla-share-factor 2", "--cla-share-factor 2: cannot be combined"),
        (BASE + ROPE + "--attention-weight-reuse-prob 0.5", "--attention-weight-reuse-prob 0.5: cannot be combined"),
        (BASE + ROPE + "--use-rope-scaling", "--use-rope-scaling: cannot be combined"),
        (BASE + ROPE + "--qk-pos-emb-head-dim 3", "--qk-pos-emb-head-dim 3: must be even"),
        ("--rotary-scaling-factor 4", "--rotary-scaling-factor 4.0: needs --multi-latent-attention"),
        (BASE + ROPE + "--mscale 0.5", "--mscale 0.5: needs --rotary-scaling-factor"),
        (BASE + ROPE + "--rotary-scaling-factor 0.5", "--rotary-scaling-factor 0.5: must be at least 1"),
        (
            BASE + ROPE + "--rotary-scaling-factor 4 --beta-fast 0.5",
            "--beta-fast 0.5: must be greater than --beta-slow",
        ),
        ("--kv-lora-rank 64", "--kv-lora-rank 64: needs --multi-latent-attention"),
        (
            BASE + ROPE + "--q-lora-rank 33 --tensor-model-parallel-size 2",
            "--tensor-model-parallel-size 2: must divide --q-lora-rank 33",
        ),
        (
            BASE + ROPE + "--kv-lora-rank 33 --tensor-model-parallel-size 2",
            "--tensor-model-parallel-size 2: must divide --kv-lora-rank + --qk-pos-emb-head-dim, which is 97",
        ),
    ],
)
def test_what_cannot_work_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(parse_run(words.split(), prog="pretrain", description="")[0], 2)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_upstream_still_leaves_alone_what_is_gathered() -> None:
    """What `model/latent_attention.py` relies on."""
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    source = inspect.getsource(MLASelfAttention.get_query_key_value_tensors)
    gathered = "if kv_combined.size(-1) != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim"
    assert gathered in source, "megatron-core gathers the latent vector in another way"
    again = "k_pos_emb = gather_from_sequence_parallel_region(k_pos_emb, group=self.tp_group)"
    assert again in source, "megatron-core no longer sums the shared key's gradient under sequence parallelism"
