"""The analytic counts against the model that megatron-core builds, rank by rank."""

import pytest

from megatron_moe.config.flags import parse_run
from megatron_moe.config.run import RunConfig
from megatron_moe.model.parameters import stage_memory
from tests.helpers.distributed import run_ranks

BASE = (
    "--device cpu --num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --vocab-size 1000 "
    "--train-iters 1 "
)
MODELS = {
    "pyramid-residual": "--num-experts 4 8 --expert-interval 2 --mlp-type residual",
    "added, narrow experts": "--num-experts 4 8 --expert-interval 2 --mlp-type residual --residual-combine add "
    "--moe-ffn-hidden-size 96",
    "shared expert": "--num-experts 4 --disable-bias-linear --swiglu --normalization RMSNorm --qk-layernorm "
    "--moe-shared-expert-intermediate-size 96 --moe-shared-expert-gate --num-query-groups 2 --kv-channels 32 "
    "--position-embedding-type rope --untie-embeddings-and-output-weights --moe-router-topk 2",
    "one expert, with a copy under EP 2": "--num-experts 1 4 --expert-interval 2",
    "expert residual network": "--num-experts 4 8 --expert-interval 2 --use-expert-residual-network",
    "expert residual network without biases": "--num-experts 4 --use-expert-residual-network --disable-bias-linear "
    "--expert-residual-layers 2 --normalization RMSNorm --swiglu",
    "hash, domain embedding": "--num-experts 4 8 --expert-interval 2 --router hash --num-domains 3 --domain-embedding",
    "shared routing embedding": "--num-experts 4 8 4 8 --router token-embedding --router-embedding-size 24",
    "routing embeddings": "--num-experts 4 8 4 8 --router token-embedding --no-router-embedding-shared",
    "query/key/value biases": "--num-experts 4 --disable-bias-linear --add-qkv-bias --qk-layernorm",
    "cross-layer attention": "--num-experts 4 --cla-share-factor 2 --num-query-groups 2 --qk-layernorm --add-qkv-bias",
}
LAYOUTS = {
    "one process": (1, ""),
    "TP 2": (2, "--tensor-model-parallel-size 2"),
    "TP 2, PP 2, EP 2": (
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1",
    ),
    "interleaved": (
        2,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --global-batch-size 2",
    ),
}


def _run(model: str, layout: str) -> RunConfig:
    words = f"{BASE} {MODELS[model]} {LAYOUTS[layout][1]}"
    return parse_run(words.split(), prog="pretrain", description="")[0]


def _built(runs: list[RunConfig]) -> tuple[int, list[int]]:
    """This rank's pipeline stage, and the parameters it holds of every run's model."""
    from megatron.core import parallel_state

    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime.distributed import start

    start(runs[0].parallel, runs[0].virtual_stages)
    counts = []
    for run in runs:
        chunks = build_model(run, initialize=False)
        counts.append(sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()))
    return parallel_state.get_pipeline_model_parallel_rank(), counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_what_is_predicted(layout: str) -> None:
    world_size = LAYOUTS[layout][0]
    runs = [_run(model, layout) for model in MODELS]
    predicted = [stage_memory(run, world_size) for run in runs]
    for stage, counts in run_ranks(world_size, _built, runs):
        assert counts == [stages[stage].parameters for stages in predicted]
