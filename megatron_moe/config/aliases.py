"""Flags of PAI/EasyNLP Rapidformer, Megatron-DeepSpeed and older Megatron-LM: what each is called here.

A flag of theirs is one of three things: another spelling of ours (`RENAMED`), short for one or more of ours
(`EXPANDED`, `VALUES`), or refused by name with what to do instead (`REFUSED`). None is ignored.
"""

from collections import deque
from collections.abc import Sequence

from megatron_moe.config.base import ConfigError

RENAMED: dict[str, str] = {
    # PAI / EasyNLP Rapidformer and Megatron-DeepSpeed
    "--moe-loss-coeff": "--moe-aux-loss-coeff",
    "--topk": "--moe-router-topk",
    "--moe-train-capacity-factor": "--moe-expert-capacity-factor",
    "--moe-expert-parallel-size": "--expert-model-parallel-size",
    "--num-key-value-heads": "--num-query-groups",
    "--tokenizer-name-or-path": "--tokenizer-model",
    "--vocab-file": "--tokenizer-model",
    "--zero-1-memory-optimization": "--use-distributed-optimizer",
    "--mixed-precision": "--fp16",
    # older Megatron-LM
    "--micro-batch": "--micro-batch-size",
    "--batch-size": "--micro-batch-size",
    "--model-parallel-size": "--tensor-model-parallel-size",
    "--layernorm-epsilon": "--norm-epsilon",
    "--wandb-exp-name": "--wandb-name",
}
"""Their spelling -> ours; the values are the same."""

EXPANDED: dict[str, tuple[str, ...]] = {
    "--disable-moe-token-dropping": ("--moe-expert-capacity-factor", "none"),
    "--checkpoint-activations": (
        *("--recompute-granularity", "full"),
        *("--recompute-method", "uniform"),
        *("--recompute-num-layers", "1"),
    ),
    "--use-rotary-position-embeddings": ("--position-embedding-type", "rope"),
    "--rotary-position-embeddings": ("--position-embedding-type", "rope"),
    "--no-position-embedding": ("--position-embedding-type", "none"),
}
"""A switch of theirs -> the flags of ours that it stands for."""

_PLAIN_ROUTER = ("--router", "topk")
# PAI's released layer is the identity (its margin is fixed at 1); what its name promises is a margin of 2.
_LARGE_MARGIN = ("--router", "large-margin", "--router-margin-type", "lsoftmax")
_STRATEGIES = {"normal": _PLAIN_ROUTER, "standard": _PLAIN_ROUTER, "lsoftmax": _LARGE_MARGIN}
VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    "--tokenizer-type": {
        "ChineseBPETokenizer": ("--tokenizer-type", "SentencePieceTokenizer"),
        "GPTSentencePieceTokenizer": ("--tokenizer-type", "SentencePieceTokenizer"),
        "Llama2Tokenizer": ("--tokenizer-type", "SentencePieceTokenizer"),
        "HFTokenizer": ("--tokenizer-type", "HuggingFaceTokenizer"),
    },
    "--top-k-linear-strategy": _STRATEGIES,
    "--moe-linear-layer-type": _STRATEGIES,
    "--noisy-gate-policy": {
        "Jitter": ("--moe-input-jitter-eps", "0.01"),
        "RSample": ("--moe-router-noise", "rsample"),
        "None": ("--moe-input-jitter-eps", "none", "--moe-router-noise", "none"),
    },
}
"""A flag and value of theirs -> flags of ours. Other values of a flag that is also ours pass unchanged."""

_ALWAYS = "remove it; this is how it always works here"
_TENSORBOARD = "remove it; TensorBoard events are written to the tensorboard folder of --save (--no-tensorboard: not)"
_RECOMPUTE = "use --recompute-granularity full --recompute-method uniform --recompute-num-layers N"
_SCHEDULE = "remove it; the schedule is the command line's. --finetune starts it afresh"
_ITERATIONS = "count in steps: tokens / (--global-batch-size x --seq-length)"
_GENERATE = "is no training flag; generate with python -m megatron_moe.generate --load RUN"
_DISTILLATION = "remove it; distillation (MoS) is not part of pretraining"
_FUSION = "remove it; fused kernels come with --transformer-impl transformer_engine"
_DEEPSPEED = "remove it; DeepSpeed is not used. ZeRO-1 is --use-distributed-optimizer, fp16 is --fp16"

REFUSED: dict[str, str] = {
    # memory and parallelism
    "--zero-2-memory-optimization": "gradients are not sharded here; use --use-distributed-optimizer, which "
    "shards the optimizer state (ZeRO-1)",
    "--zero-3-memory-optimization": "weights are not sharded over data-parallel ranks here; use "
    "--use-distributed-optimizer and tensor, pipeline or expert parallelism",
    "--fsdp-memory-optimization": "weights are not sharded over data-parallel ranks here; use "
    "--use-distributed-optimizer and tensor, pipeline or expert parallelism",
    "--zero-stage": "for stage 1 use --use-distributed-optimizer; stages 2 and 3 are not available",
    "--cpu-offload": "the optimizer state stays on the device; shard it with --use-distributed-optimizer",
    "--checkpoint-num-layers": _RECOMPUTE,
    "--activations-checkpoint-method": "use --recompute-granularity full --recompute-method uniform or block",
    "--partition-activations": "use --sequence-parallel, which splits the kept activations",
    "--distribute-saved-activations": "use --sequence-parallel, which splits the kept activations",
    "--checkpoint-in-cpu": "kept activations stay on the device; recompute more, or use --sequence-parallel",
    "--no-pipeline-parallel": "remove it; --pipeline-model-parallel-size 1 is the default",
    "--enable-expert-tensor-parallelism": "remove it: experts use the tensor-parallel size by default "
    "(--expert-tensor-parallel-size 1 turns that off)",
    "--DDP-impl": _ALWAYS,
    "--no-contiguous-buffers-in-local-ddp": _ALWAYS,
    "--distributed-backend": "use --device cpu (gloo) or --device cuda (NCCL)",
    "--use-cpu-initialization": "remove it; weights depend on --seed alone, on any device",
    "--deepspeed": _DEEPSPEED,
    "--deepspeed_config": _DEEPSPEED,
    "--deepspeed-activation-checkpointing": _RECOMPUTE,
    # experts
    "--moe-eval-capacity-factor": "remove it; generation and scoring drop no tokens",
    "--create-moe-param-group": _ALWAYS,
    "--use-tutel": "remove it; megatron-core's dispatcher is used (--moe-token-dispatcher-type)",
    "--moe-grouped-gemm": "remove it; grouped matrix products are the default (--moe-expert-backend)",
    "--router-type": "its numbers are not documented; use --router and --moe-router-load-balancing-type",
    # model
    "--group-query-attention": "remove it; --num-query-groups says it",
    "--use-flash-attn": "remove it; scaled_dot_product_attention takes the fastest kernel that fits",
    "--no-masked-softmax-fusion": _FUSION,
    "--no-bias-gelu-fusion": _FUSION,
    "--no-bias-swiglu-fusion": _FUSION,
    "--no-bias-dropout-fusion": _FUSION,
    "--no-rope-fusion": _FUSION,
    "--no-gradient-accumulation-fusion": _FUSION,
    "--attention-softmax-in-fp32": _ALWAYS,
    "--no-async-tensor-model-parallel-allreduce": "remove it; there is no such overlap to turn off",
    "--use-mcore-models": _ALWAYS,
    "--use-legacy-models": "remove it; models are megatron-core's",
    # data and tokenizer
    "--data-impl": "remove it; data are .bin/.idx files that tools/preprocess_data.py writes",
    "--mmap-warmup": "remove it; there is no warm-up of the data files",
    "--train-data": "use --train-data-path with .bin/.idx files that tools/preprocess_data.py writes",
    "--valid-data": "use --valid-data-path with .bin/.idx files that tools/preprocess_data.py writes",
    "--vocab-extra-ids": "remove it; the tokenizer's vocabulary is used as it is",
    # duration, schedule and loading
    "--epochs": f"use --train-iters or --train-tokens; {_ITERATIONS}",
    "--train-samples": "use --train-tokens (samples x --seq-length)",
    "--lr-decay-tokens": f"use --lr-decay-iters; {_ITERATIONS}",
    "--lr-warmup-tokens": f"use --lr-warmup-iters; {_ITERATIONS}",
    "--lr-decay-samples": "use --lr-decay-iters: samples / --global-batch-size",
    "--lr-warmup-samples": "use --lr-warmup-iters: samples / --global-batch-size",
    "--lr-wsd-decay-samples": "use --lr-wsd-decay-iters: samples / --global-batch-size",
    "--warmup": "use --lr-warmup-fraction or --lr-warmup-iters",
    "--override-lr-scheduler": _SCHEDULE,
    "--override-opt_param-scheduler": _SCHEDULE,
    "--override-opt-param-scheduler": _SCHEDULE,
    "--exit-interval": "use --train-iters",
    "--pretrained-model-name-or-path": "use --load DIR --finetune with a run's folder or one of Hugging "
    "Face; tools/convert_checkpoint.py makes a run of others",
    "--use-dist-ckpt": _ALWAYS,
    "--use-checkpoint-args": "use --config RUN/config.yaml",
    "--ckpt-format": _ALWAYS,
    # distillation
    "--mos": _DISTILLATION,
    "--kd": _DISTILLATION,
    "--kd-beta-ce": _DISTILLATION,
    "--kd-alpha-ce": _DISTILLATION,
    "--kd-temp": _DISTILLATION,
    "--load-teacher": _DISTILLATION,
    "--num-layers-teacher": _DISTILLATION,
    "--num-experts-teacher": _DISTILLATION,
    "--hidden-size-teacher": _DISTILLATION,
    "--num-attention-heads-teacher": _DISTILLATION,
    # logging
    "--tensorboard-dir": _TENSORBOARD,
    "--tensorboard-queue-size": _TENSORBOARD,
    "--logging-path": "remove it; metrics.jsonl is written to --save",
    "--log-timers-to-tensorboard": _TENSORBOARD,
    "--log-batch-size-to-tensorboard": _TENSORBOARD,
    "--log-validation-ppl-to-tensorboard": _TENSORBOARD,
    # generation and evaluation
    "--inference": _GENERATE,
    "--text-generate-input-file": _GENERATE,
    "--text-generate-output-file": _GENERATE,
    "--input_len": _GENERATE,
    "--out-seq-length": _GENERATE,
    "--top_k": _GENERATE,
    "--top_p": _GENERATE,
    "--adaptive-seq-len": "remove it; python -m megatron_moe.score --help lists the flags of scoring",
    "--eval-fp32": "remove it; python -m megatron_moe.score --help lists the flags of scoring",
    "--eval-tasks": "score the task's texts with python -m megatron_moe.score",
    "--num-fewshot": "put the examples into the text and score it with python -m megatron_moe.score",
}
"""A flag of theirs that has no meaning here -> why, and what to do."""

REFUSED_VALUES: dict[str, dict[str, str]] = {
    "--tokenizer-type": {
        "BertWordPieceLowerCase": "a decoder needs a tokenizer with an end-of-document token",
    },
}
"""A value of theirs that has no counterpart here -> what to do."""


def translate(argv: Sequence[str], known: set[str]) -> list[str]:
    """`argv` with every alias replaced by our flags.

    Args:
        argv: words of a command line.
        known: the flags of the parser at hand. An alias of a flag that this parser lacks is left alone, to be
            reported as unknown.

    Raises:
        ConfigError: a refused flag or value, or an alias together with the flag it stands for.
    """
    words: list[str] = []
    set_by: dict[str, str] = {}
    queue = deque(argv)
    while queue:
        word = queue.popleft()
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            words.append(word)
            continue
        if not equals:
            value = queue[0] if queue and not queue[0].startswith("--") else ""
        _refuse(name, value, known)
        ours = _counterpart(name, value, known)
        if not ours or not _flags(ours) <= known:
            _claim(name, name, known, set_by)
            words.append(word)
            continue
        for flag in _flags(ours):
            _claim(flag, name, known, set_by)
        words += ours
        if name in EXPANDED and equals:
            raise ConfigError(f"{word}: takes no value")
        if name in RENAMED and equals:
            words.append(value)
        if name in VALUES and not equals:
            queue.popleft()
    return words


def _refuse(name: str, value: str, known: set[str]) -> None:
    """Raise for a flag or value that has no meaning here, unless the parser at hand has a flag of that
    name."""
    if name in REFUSED and name not in known:
        raise ConfigError(f"{name}: {REFUSED[name]}")
    reason = REFUSED_VALUES.get(name, {}).get(value)
    if reason is not None:
        raise ConfigError(f"{name} {value}: {reason}")


def _counterpart(name: str, value: str, known: set[str]) -> tuple[str, ...]:
    """Our words for a flag (and, in `VALUES`, its value); nothing when it is not an alias."""
    if name in RENAMED:
        return (RENAMED[name],)
    if name in EXPANDED:
        return EXPANDED[name]
    table = VALUES.get(name, {})
    if table and value not in table and name not in known:
        raise ConfigError(f"{name} {value}".rstrip() + f": must be one of {', '.join(table)}")
    return table.get(value, ())


def _flags(words: Sequence[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def _claim(flag: str, name: str, known: set[str], set_by: dict[str, str]) -> None:
    """Note that `name` sets `flag`; two names for one flag are an error, one name twice is not (the last
    wins)."""
    positive = "--" + flag.removeprefix("--no-")
    target = positive if positive in known else flag
    earlier = set_by.setdefault(target, name)
    if (earlier in known) != (name in known) or (earlier != name and name not in known):
        raise ConfigError(f"{earlier} and {name}: both set {target}; give one of them")
