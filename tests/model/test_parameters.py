"""Analytic parameter counts against the published ones, and bytes per rank against sums over ranks."""

import dataclasses

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.optimizer import OptimizerConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.training import TrainingConfig
from megatron_moe.config.yaml_io import build_run, load_recipe
from megatron_moe.model.flops import forward_flops_per_token
from megatron_moe.model.parameters import (
    ParameterCounts,
    attention_size,
    count_parameters,
    expert_size,
    stage_layers,
    stage_memory,
)

PYRAMID_32 = (32,) * 10 + (64, 64)
PYRAMID_64 = (64,) * 10 + (128, 128)


def _gpt(
    layers: int,
    hidden: int,
    heads: int,
    experts: tuple[int, ...] | None,
    *,
    vocabulary: int = 50257,
    residual: bool = False,
) -> RunConfig:
    """GPT-2-like, sequence 2048, experts in every second layer."""
    return RunConfig(
        model=ModelConfig(
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            seq_length=2048,
            vocab_size=vocabulary,
        ),
        moe=MoEConfig(num_experts=experts, expert_interval=2, mlp_type="residual" if residual else "standard"),
    )


def _billions(number: int, digits: int) -> float:
    return round(number / 1e9, digits)


PUBLISHED = {
    "PAI 16B": (_gpt(24, 2048, 16, PYRAMID_32, vocabulary=50000, residual=True), 16.353),
    "PAI 16B without residual": (_gpt(24, 2048, 16, PYRAMID_32, vocabulary=50000), 15.95),
    "PAI 13B throughput model": (_gpt(24, 1024, 16, (128,), vocabulary=50000), 13.15),
    "PAI 13B with residual": (_gpt(24, 1024, 16, (128,), vocabulary=50000, residual=True), 13.25),
    "350M+PR-MoE-32/64": (_gpt(24, 1024, 16, PYRAMID_32, residual=True), 4.117),
    "1.3B+PR-MoE-64/128": (_gpt(24, 2048, 16, PYRAMID_64, residual=True), 31.39),
    "350M+PR-MoE+MoS": (_gpt(21, 1024, 16, (32,) * 8 + (64, 64), residual=True), 3.542),
    "1.3B+PR-MoE+MoS": (_gpt(21, 2048, 16, (64,) * 8 + (128, 128), residual=True), 26.94),
    "350M+MoE-128": (_gpt(24, 1024, 16, (128,)), 13.15),
    "1.3B+MoE-128": (_gpt(24, 2048, 16, (128,)), 52.47),
    "125M+MoE-64": (_gpt(12, 768, 12, (64,)), 1.911),
    # ModelScope's checkpoints have a vocabulary of 25,600 (GPTMoEConfig).
    "PAI 0.35B_MoE-64": (_gpt(24, 1024, 16, (64,), vocabulary=25600), 6.68),
    "PAI 1.3B_MoE-32": (_gpt(24, 2048, 16, (32,), vocabulary=25600), 13.75),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str) -> None:
    run, billions = PUBLISHED[name]
    digits = len(str(billions).split(".")[1])
    assert _billions(count_parameters(run).total, digits) == billions


def test_pai_16b_parts() -> None:
    counts = count_parameters(PUBLISHED["PAI 16B"][0])
    assert _billions(counts.experts, 3) == 15.037
    assert _billions(counts.non_expert, 3) == 1.315
    assert _billions(counts.activated, 3) == 1.719
    assert _billions(count_parameters(PUBLISHED["PAI 16B without residual"][0]).non_expert, 3) == 0.912


@pytest.mark.parametrize("name", ["PAI 16B", "PAI 16B without residual", "350M+PR-MoE-32/64", "125M+MoE-64"])
def test_closed_formula(name: str) -> None:
    """The formula of the published counts, written independently of the components."""
    run, _ = PUBLISHED[name]
    model, experts = run.model, run.moe.experts_per_layer(run.model.num_layers)
    h, layers, moe = model.hidden_size, model.num_layers, sum(count > 0 for count in experts)
    expert, attention = 8 * h * h + 5 * h, 4 * h * h + 4 * h
    residual = moe * (expert + 2 * h + 2) if run.moe.mlp_type == "residual" else 0
    total = layers * (attention + 4 * h) + (layers - moe) * expert + residual + sum(experts) * (expert + h)
    total += (model.vocab_size or 0) * h + model.max_positions * h + 2 * h
    assert count_parameters(run).total == total


def test_hunyuan_large() -> None:
    """Published: 389 B and 52 B; exactly, 388.7 B and 51.3 B. Expert learning rate: test_expert_lr.py."""
    counts = count_parameters(build_run(load_recipe("hunyuan-large")))
    assert _billions(counts.total, 1) == 388.7
    assert _billions(counts.activated, 1) == 51.3


def test_qwen3_30b_a3b() -> None:
    counts = count_parameters(build_run(load_recipe("qwen3-moe-30b-a3b")))
    assert _billions(counts.total, 1) == 30.5
    assert 3.3 <= counts.activated / 1e9 < 3.4


@pytest.mark.parametrize(
    ("recipe", "billions"),
    [
        ("pai-gpt-moe-16b", 16.353),
        ("pai-gpt-moe-13b", 13.149),
        ("gpt-125m-moe64", 1.911),
        ("pr-moe-350m", 4.117),
        ("pr-moe-1.3b", 31.392),
        ("pangu-sigma", 1084.991),
    ],
)
def test_recipes_have_the_published_size(recipe: str, billions: float) -> None:
    assert _billions(count_parameters(build_run(load_recipe(recipe))).total, 3) == billions


def test_padded_vocabulary() -> None:
    run = _gpt(24, 2048, 16, PYRAMID_32, vocabulary=50000, residual=True)
    extra = count_parameters(run, padded_vocab=True).total - count_parameters(run).total
    assert extra == 48 * 2048


def test_components_sum_to_total() -> None:
    counts = count_parameters(PUBLISHED["PAI 16B"][0])
    assert sum(counts.components().values()) == counts.total
    assert {field.name for field in dataclasses.fields(ParameterCounts)} - set(counts.components()) == {
        "active_experts"
    }


def test_vocabulary_must_be_known() -> None:
    with pytest.raises(ConfigError, match="--vocab-size: not known"):
        count_parameters(RunConfig())


def test_details_of_a_layer() -> None:
    def run(moe: MoEConfig | None = None, **flags: bool) -> RunConfig:
        model = ModelConfig(hidden_size=64, num_query_groups=2, **flags)  # type: ignore[arg-type]
        return RunConfig(model=model, moe=moe or MoEConfig())

    plain = attention_size(run(disable_bias_linear=True)).total
    assert plain == 64 * (64 + 2 * 32) + 64 * 64
    assert attention_size(run(disable_bias_linear=True, add_qkv_bias=True)).total == plain + 128
    assert attention_size(run(disable_bias_linear=True, qk_layernorm=True)).total == plain + 2 * 2 * 16
    narrow = run(MoEConfig(num_experts=(2,), moe_ffn_hidden_size=32), swiglu=True)
    assert expert_size(narrow).total == 3 * 64 * 32 + 2 * 32 + 64


def test_expert_residual_networks_are_counted() -> None:
    """Three blocks on each of two layers; 2 operations a weight and token. All of it is active, none of it expert."""
    h, plain = 64, _gpt(4, 64, 4, (4, 8))
    flags = {"use_expert_residual_network": True, "expert_residual_layers": 3}
    run = dataclasses.replace(plain, moe=dataclasses.replace(plain.moe, **flags))
    counts, before = count_parameters(run), count_parameters(plain)
    assert counts.expert_residual == 2 * 3 * (2 * 4 * h * h + 4 * h + h + 2 * h)
    assert counts.total - before.total == counts.expert_residual
    assert counts.activated - before.activated == counts.expert_residual
    assert counts.experts == before.experts
    assert forward_flops_per_token(run) - forward_flops_per_token(plain) == 2 * 3 * 2 * (2 * 4 * h * h)


def _parallel(run: RunConfig, **sizes: object) -> RunConfig:
    return dataclasses.replace(run, parallel=ParallelConfig(**sizes))  # type: ignore[arg-type]


def test_one_rank_holds_the_whole_model() -> None:
    run = _gpt(4, 64, 4, (4, 8), residual=True)
    (stage,) = stage_memory(run, 1)
    assert stage.parameters == count_parameters(run, padded_vocab=True).total
    assert stage.weight_bytes == stage.gradient_bytes == 4 * stage.parameters
    assert stage.optimizer_bytes == 8 * stage.parameters
    assert stage.total_bytes == 16 * stage.parameters


def test_expert_parallel_ranks_share_the_experts() -> None:
    run = _gpt(4, 64, 4, (4, 8))
    counts = count_parameters(run, padded_vocab=True)
    (stage,) = stage_memory(_parallel(run, expert_model_parallel_size=4), 4)
    assert stage.parameters == counts.total - counts.experts + counts.experts // 4


def test_layer_with_fewer_experts_than_ranks_is_copied() -> None:
    run = _gpt(4, 64, 4, (2, 8))
    counts = count_parameters(run, padded_vocab=True)
    (stage,) = stage_memory(_parallel(run, expert_model_parallel_size=4, use_distributed_optimizer=True), 8)
    assert counts.experts == 10 * expert_size(run).total
    held = (1 + 2) * expert_size(run).total
    assert stage.parameters == counts.total - counts.experts + held
    # Copies inside of the expert-parallel group keep their state each: two replicas share it, not four.
    assert stage.optimizer_bytes == 8 * (-(-(counts.total - counts.experts) // 8) + held // 2)


def test_pipeline_stages_hold_the_model_and_a_second_embedding() -> None:
    run = _gpt(4, 64, 4, (4, 8))
    stages = stage_memory(_parallel(run, pipeline_model_parallel_size=2), 2)
    counts = count_parameters(run, padded_vocab=True)
    assert [stage.layers for stage in stages] == [(1, 2), (3, 4)]
    assert sum(stage.parameters for stage in stages) == counts.total + counts.embedding


def test_untied_output_is_not_a_copy() -> None:
    run = _gpt(4, 64, 4, (4, 8))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, untie_embeddings_and_output_weights=True))
    stages = stage_memory(_parallel(run, pipeline_model_parallel_size=2), 2)
    assert sum(stage.parameters for stage in stages) == count_parameters(run, padded_vocab=True).total


def test_tensor_parallel_splits_matrices_only() -> None:
    run = _gpt(4, 64, 4, None)
    (whole,) = stage_memory(run, 1)
    (half,) = stage_memory(_parallel(run, tensor_model_parallel_size=2), 2)
    # Positions, norms and the biases of the row-parallel layers (attention output, MLP output) stay whole.
    replicated = 2048 * 64 + (2 * 4 + 1) * 2 * 64 + 4 * 2 * 64
    assert 2 * half.parameters == whole.parameters + replicated


def test_expert_tensor_parallel_splits_experts() -> None:
    run = _gpt(4, 64, 4, (4, 8))
    (whole,) = stage_memory(_parallel(run, tensor_model_parallel_size=2, expert_tensor_parallel_size=1), 2)
    (split,) = stage_memory(_parallel(run, tensor_model_parallel_size=2), 2)
    assert 2 * (whole.parameters - split.parameters) == 12 * (expert_size(run).total - 64)


def test_distributed_optimizer_shards_the_state() -> None:
    run = dataclasses.replace(_gpt(4, 64, 4, (4, 8)), training=TrainingConfig(bf16=True))
    (whole,) = stage_memory(_parallel(run, expert_model_parallel_size=2), 4)
    (shared,) = stage_memory(_parallel(run, expert_model_parallel_size=2, use_distributed_optimizer=True), 4)
    assert (shared.weight_bytes, shared.gradient_bytes) == (whole.weight_bytes, whole.gradient_bytes)
    assert whole.optimizer_bytes == 12 * whole.parameters
    experts = count_parameters(run).experts // 2
    dense = whole.parameters - experts
    # The dense part has four replicas, the experts of a rank have two.
    assert shared.optimizer_bytes == 12 * (dense // 4 + experts // 2)


def test_sgd_keeps_less() -> None:
    run = dataclasses.replace(_gpt(4, 64, 4, None), optimizer=OptimizerConfig(optimizer="sgd"))
    assert stage_memory(run, 1)[0].optimizer_bytes == 4 * stage_memory(run, 1)[0].parameters
    bare = dataclasses.replace(run, optimizer=OptimizerConfig(optimizer="sgd", sgd_momentum=0.0))
    assert stage_memory(bare, 1)[0].optimizer_bytes == 0


def test_interleaved_stages() -> None:
    run = _parallel(_gpt(8, 64, 4, None), pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=2)
    assert stage_layers(run) == [(1, 2, 5, 6), (3, 4, 7, 8)]
