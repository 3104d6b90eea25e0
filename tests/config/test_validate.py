"""Checks that need several sections or the number of processes."""

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import parse_run
from megatron_moe.config.validate import validate

BASE = "--num-layers 8 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --vocab-size 100 --train-iters 9 "
MOE = BASE + "--num-experts 4 4 4 8 --expert-interval 2 "
TP2 = "--tensor-model-parallel-size 2 "
PP2 = "--pipeline-model-parallel-size 2 "


def _validate(words: str, world_size: int) -> None:
    run, _ = parse_run(words.split(), prog="pretrain", description="")
    validate(run, world_size)


@pytest.mark.parametrize(
    ("words", "world_size"),
    [
        (BASE, 1),
        (BASE, 7),
        (BASE + TP2 + PP2, 4),
        (MOE + "--expert-model-parallel-size 4", 4),
        (MOE + "--expert-model-parallel-size 8", 8),
        (BASE + "--num-experts 1 2 4 12 --expert-interval 2 --expert-model-parallel-size 4", 4),
        (MOE + TP2 + PP2 + "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1", 4),
        (MOE + TP2 + "--context-parallel-size 2 --expert-model-parallel-size 2", 4),
        (BASE + PP2 + "--num-layers-per-virtual-pipeline-stage 2 --global-batch-size 4", 2),
        (BASE + "--rampup-batch-size 2 2 100 --global-batch-size 8", 2),
        (BASE + "--recompute-granularity full --recompute-method block --recompute-num-layers 8", 1),
        (BASE + "--lr-decay-style WSD --lr-wsd-decay-iters 9 --lr-warmup-iters 8", 1),
        (MOE + "--moe-router-topk 2 --moe-router-num-groups 2 --moe-router-group-topk 1", 1),
        (MOE + "--moe-shared-expert-intermediate-size 32 --disable-bias-linear", 1),
    ],
)
def test_legal_runs(words: str, world_size: int) -> None:
    _validate(words, world_size)


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        # the world
        (
            BASE + TP2 + PP2,
            6,
            "--context-parallel-size 1 = 4: must divide the number of processes, which is 6",
        ),
        (
            MOE + "--expert-model-parallel-size 4",
            2,
            "--expert-tensor-parallel-size 1 x --expert-model-parallel-size 4 x --pipeline-model-parallel-size 1 = 4: "
            "must divide the number of processes, which is 2",
        ),
        # tensor parallelism
        (
            BASE + "--tensor-model-parallel-size 8",
            8,
            "--tensor-model-parallel-size 8: must divide --num-attention-heads 4",
        ),
        (
            BASE + "--num-query-groups 2 --tensor-model-parallel-size 4",
            4,
            "--tensor-model-parallel-size 4: must divide --num-query-groups 2; key/value heads are split over the "
            "ranks, not copied",
        ),
        (
            BASE + TP2 + "--ffn-hidden-size 99",
            2,
            "--tensor-model-parallel-size 2: must divide --ffn-hidden-size 99",
        ),
        (
            MOE + TP2 + "--expert-tensor-parallel-size 1 --mlp-type residual --moe-ffn-hidden-size 33",
            2,
            "--tensor-model-parallel-size 2: must divide the width of the residual MLP, --moe-ffn-hidden-size 33",
        ),
        (
            MOE + TP2 + "--moe-shared-expert-intermediate-size 33 --disable-bias-linear",
            2,
            "--tensor-model-parallel-size 2: must divide --moe-shared-expert-intermediate-size 33",
        ),
        (
            BASE + TP2 + "--make-vocab-size-divisible-by 1",
            2,
            "--tensor-model-parallel-size 2: must divide --make-vocab-size-divisible-by 1",
        ),
        # pipeline
        (
            BASE + "--pipeline-model-parallel-size 3",
            3,
            "--pipeline-model-parallel-size 3: must divide --num-layers 8",
        ),
        (
            BASE + PP2 + "--num-layers-per-virtual-pipeline-stage 3 --global-batch-size 4",
            2,
            "--num-layers-per-virtual-pipeline-stage 3: must divide the 4 layers of a stage (--num-layers 8 / "
            "--pipeline-model-parallel-size 2)",
        ),
        (
            BASE + PP2 + "--num-layers-per-virtual-pipeline-stage 2 --global-batch-size 3",
            2,
            "--global-batch-size 3: makes 3 micro-batches; an interleaved pipeline needs a multiple of "
            "--pipeline-model-parallel-size 2",
        ),
        (
            BASE + PP2 + "--num-layers-per-virtual-pipeline-stage 2 --global-batch-size 4 --rampup-batch-size 1 1 9",
            2,
            "--global-batch-size 1: makes 1 micro-batches",
        ),
        # sequence
        (
            BASE + "--context-parallel-size 2 --seq-length 62",
            2,
            "--seq-length 62: must be a multiple of 2 x --context-parallel-size 2 = 4",
        ),
        (
            BASE + TP2 + "--sequence-parallel --seq-length 63",
            2,
            "--seq-length 63: must be a multiple of --tensor-model-parallel-size 2 x --context-parallel-size 1 = 2, "
            "because --sequence-parallel splits the sequence",
        ),
        (MOE + TP2 + "--seq-length 63", 2, "because experts under tensor parallelism split the sequence"),
        (
            BASE + "--position-embedding-type rope --rotary-percent 0.2",
            1,
            "--rotary-percent 0.2: must leave an even number of the 16 channels of a head to rotate, not 3",
        ),
        # experts
        (
            MOE + "--expert-model-parallel-size 6",
            6,
            "--expert-model-parallel-size 6: must be a divisor or a multiple of the number of experts of every layer; "
            "layers 2, 4, 6 have 4",
        ),
        (
            BASE + "--num-experts 4 4 6 8 --expert-interval 2 --expert-model-parallel-size 4",
            4,
            "--expert-model-parallel-size 4: must be a divisor or a multiple of the number of experts of every layer; "
            "layer 6 has 6",
        ),
        (
            BASE + "--expert-model-parallel-size 2",
            2,
            "--expert-model-parallel-size 2: needs --num-experts",
        ),
        (
            BASE + "--expert-tensor-parallel-size 2",
            2,
            "--expert-tensor-parallel-size 2: needs --num-experts",
        ),
        (
            MOE + "--expert-tensor-parallel-size 2 --moe-ffn-hidden-size 33",
            2,
            "--expert-tensor-parallel-size 2: must divide the width of an expert, --moe-ffn-hidden-size 33",
        ),
        (
            MOE + "--moe-shared-expert-intermediate-size 32",
            1,
            "--moe-shared-expert-intermediate-size 32: needs --disable-bias-linear (megatron-core's shared experts "
            "have no biases)",
        ),
        (
            MOE + "--moe-router-num-groups 8 --moe-router-group-topk 1",
            1,
            "--moe-router-num-groups 8: must divide the number of experts of every layer; layer 2 has 4",
        ),
        (
            MOE + "--moe-router-num-groups 2 --moe-router-group-topk 3",
            1,
            "--moe-router-group-topk 3: must be at most --moe-router-num-groups 2",
        ),
        (
            MOE + "--moe-router-topk 3 --moe-router-num-groups 2 --moe-router-group-topk 2",
            1,
            "--moe-router-group-topk 2: must divide --moe-router-topk 3",
        ),
        (
            MOE + "--moe-router-topk 3 --moe-router-num-groups 2 --moe-router-group-topk 1",
            1,
            "--moe-router-topk 3: must be at most --moe-router-group-topk 1 x 2 experts of a group",
        ),
        # backends
        (
            BASE + "--device cpu --transformer-impl transformer_engine",
            1,
            "--transformer-impl transformer_engine: needs a GPU; with --device cpu it is local",
        ),
        (
            MOE + "--device cpu --moe-token-dispatcher-type flex",
            1,
            "--moe-token-dispatcher-type flex: needs a GPU; with --device cpu it is alltoall",
        ),
        (
            MOE + "--moe-token-dispatcher-type flex",
            1,
            "--moe-token-dispatcher-type flex: must be alltoall or allgather where a rank has all experts of a layer, "
            "as of layer 2, 4, 6, 8",
        ),
        (
            BASE + "--num-experts 1 4 4 8 --expert-interval 2 --expert-model-parallel-size 4 "
            "--moe-token-dispatcher-type flex",
            4,
            "where a rank has all experts of a layer, as of layer 2",
        ),
        (
            BASE + "--context-parallel-size 2 --attention-backend unfused",
            2,
            "--attention-backend unfused: must be sdpa with --context-parallel-size 2",
        ),
        (
            MOE + "--transformer-impl transformer_engine --tensor-model-parallel-size 2",
            2,
            "--expert-tensor-parallel-size 2: must be 1 for experts with biases under --transformer-impl",
        ),
        (
            MOE + "--moe-expert-backend te --device cuda --tensor-model-parallel-size 2",
            2,
            "--expert-tensor-parallel-size 2: must be 1 for experts with biases under --moe-expert-backend te",
        ),
        (MOE + "--moe-expert-backend te --device cpu", 1, "--moe-expert-backend te: needs a GPU"),
        # flags without a meaning
        (BASE + "--moe-aux-loss-coeff 0.02", 1, "--moe-aux-loss-coeff 0.02: needs --num-experts"),
        (BASE + "--moe-layer-freq 1 0", 1, "--moe-layer-freq 1 0: needs --num-experts"),
        (BASE + "--rotary-percent 0.5", 1, "--rotary-percent 0.5: needs --position-embedding-type rope"),
        (BASE + "--use-rope-scaling", 1, "--use-rope-scaling True: needs --position-embedding-type rope"),
        (
            BASE + "--position-embedding-type rope --rope-scaling-factor 4",
            1,
            "--rope-scaling-factor 4.0: needs --use-rope-scaling",
        ),
        (
            BASE + "--position-embedding-type rope --use-rope-scaling --rope-scaling-factor 0.5",
            1,
            "--rope-scaling-factor 0.5: must be at least 1",
        ),
        (BASE + "--num-domains 4097", 1, "--num-domains 4097: must be at most 4096"),
        (
            MOE + "--use-expert-residual-network --expert-residual-layers 10001",
            1,
            "--expert-residual-layers 10001: must be at most 10000",
        ),
        (BASE + "--gelu-tanh --swiglu", 1, "--swiglu and --gelu-tanh: give one of them"),
        (
            MOE + "--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0 --moe-router-topk-scaling-factor 2",
            1,
            "--moe-router-topk-scaling-factor 2.0: cannot be combined with --moe-router-load-balancing-type sinkhorn",
        ),
        (BASE + "--seed -1", 1, "--seed -1: must be at least 0"),
        (BASE + "--lr 0.1 --lr-warmup-init 0.2", 1, "--lr-warmup-init 0.2: must be at most --lr 0.1"),
        (BASE + "--fp16 --initial-loss-scale -4", 1, "--initial-loss-scale -4.0: must be greater than 0"),
        # batch and duration
        (
            BASE + "--global-batch-size 5 --micro-batch-size 2",
            2,
            "--global-batch-size 5: must be a multiple of --micro-batch-size 2 x data-parallel size 2 = 4",
        ),
        (
            BASE + "--global-batch-size 8 --rampup-batch-size 3 2 100",
            2,
            "--rampup-batch-size 3 2 100: must be START and INCREMENT that are multiples of --micro-batch-size 1 x "
            "data-parallel size 2 = 2, with steps of INCREMENT leading from START to --global-batch-size 8",
        ),
        (
            BASE + "--global-batch-size 8 --rampup-batch-size 4 0 100",
            1,
            "--rampup-batch-size 4 0 100: must be",
        ),
        (BASE + "--train-iters none", 1, "--train-iters: is required (or --train-tokens)"),
        (
            BASE + "--lr-warmup-iters 9",
            1,
            "--lr-warmup-iters 9: must be less than the training steps, 9",
        ),
        (
            BASE + "--train-iters none --train-tokens 129 --lr-warmup-iters 3",
            1,
            "--lr-warmup-iters 3: must be less than the training steps, 3",
        ),
        (
            BASE + "--lr-decay-iters 5 --lr-warmup-iters 6",
            1,
            "--lr-warmup-iters 6: must be less than --lr-decay-iters 5",
        ),
        (
            BASE + "--lr-decay-style WSD --lr-wsd-decay-iters 10",
            1,
            "--lr-wsd-decay-iters 10: must be at most the training steps, 9",
        ),
        # recompute
        (
            BASE + PP2 + "--recompute-granularity full --recompute-method uniform --recompute-num-layers 5",
            2,
            "--recompute-num-layers 5: must be at most 4, the layers of a pipeline stage",
        ),
        (
            BASE + PP2 + "--num-layers-per-virtual-pipeline-stage 2 --global-batch-size 2 --recompute-granularity full "
            "--recompute-method uniform --recompute-num-layers 3",
            2,
            "--recompute-num-layers 3: must be at most 2, the layers of a virtual pipeline stage",
        ),
        (
            BASE + "--recompute-activations --recompute-modules moe",
            1,
            "--recompute-modules moe: needs --num-experts",
        ),
        (
            MOE + "--recompute-activations --recompute-modules shared_experts",
            1,
            "--recompute-modules shared_experts: needs --moe-shared-expert-intermediate-size",
        ),
        (
            MOE + "--recompute-activations --recompute-modules moe_act",
            1,
            "--recompute-modules moe_act: needs --transformer-impl transformer_engine",
        ),
    ],
)
def test_illegal_runs(words: str, world_size: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _validate(words, world_size)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_vocabulary_may_still_be_unknown() -> None:
    """It can come from the tokenizer, which is opened later."""
    _validate(BASE.replace("--vocab-size 100 ", ""), 1)
