"""The report of --dry-run."""

import dataclasses

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import parse_run
from megatron_moe.model.dry_run import report


def _report(words: str, world_size: int) -> str:
    run, _ = parse_run(words.split(), prog="pretrain", description="")
    return report(run, world_size)


def test_pai_16b() -> None:
    text = _report("--recipe pai-gpt-moe-16b --expert-model-parallel-size 8 --tensor-model-parallel-size 2", 16)
    for expected in (
        "24 layers, hidden 2048, 16 attention heads of 128",
        "experts of layer 2,4,...,20: 32 experts; 22,24: 64 experts",
        "residual MLP beside the experts, combined by softmax",
        "(16.353 B)",
        "(1.719 B)",
        "(1.315 B)",
        "16 processes: TP 2, PP 1, CP 1, DP 8, EP 8, ETP 2, expert DP 1",
        "sequence parallel, distributed optimizer",
        "fp16 weights, fp32 gradients, adam state in fp32",
        "512 samples a step = 64 micro-batches of 1 on 8 replicas; 1,048,576 tokens",
        "until 100,000,000,000 tokens",
    ):
        assert expected in text


def test_experts_of_a_rank_and_their_copies() -> None:
    text = _report("--recipe pai-gpt-moe-16b --expert-model-parallel-size 64 --tensor-model-parallel-size 1", 64)
    assert "on each rank of layer 2,4,...,20: 1 of 32 experts, in 2 copies; 22,24: 1 of 64 experts" in text


def test_expert_residual_network_is_named() -> None:
    text = _report("--recipe tiny-cpu --vocab-size 100 --use-expert-residual-network --expert-residual-layers 3", 1)
    assert "expert residual network of 3 blocks after the experts" in text


def test_dense_model_has_no_expert_lines() -> None:
    text = _report(
        "--vocab-size 100 --train-iters 5 --train-tokens 1000 --rampup-batch-size 1 1 10 --global-batch-size 4",
        1,
    )
    assert "expert" not in text.split("Layout")[0].replace("non-expert", "")
    assert "rising from 1 in steps of 1 over 10 samples" in text
    assert "until 5 steps or 1,000 tokens, whichever comes first" in text


def test_stages_of_an_interleaved_pipeline() -> None:
    text = _report(
        "--vocab-size 100 --train-iters 5 --num-layers 8 --pipeline-model-parallel-size 2 "
        "--num-layers-per-virtual-pipeline-stage 2 --global-batch-size 4",
        2,
    )
    assert "1-2,5-6" in text
    assert "3-4,7-8" in text


def test_columns_line_up() -> None:
    lines = _report("--recipe pr-moe-350m", 8).splitlines()
    table = lines[lines.index("Parameters") + 1 : lines.index("Layout") - 1]
    assert len({len(line) for line in table}) == 1


def test_shared_expert() -> None:
    run, _ = parse_run(["--recipe", "qwen3-moe-30b-a3b"], prog="pretrain", description="")
    run = dataclasses.replace(run, moe=dataclasses.replace(run.moe, moe_shared_expert_intermediate_size=768))
    assert "shared expert beside the experts, width 768" in report(run, 8)


def test_invalid_runs_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tensor-model-parallel-size 3"):
        _report("--recipe pr-moe-350m --tensor-model-parallel-size 3", 3)
