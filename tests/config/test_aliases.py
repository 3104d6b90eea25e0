"""Spellings of PAI/EasyNLP, DeepSpeed and older Megatron-LM."""

import shlex
from pathlib import Path

import pytest

from megatron_moe.config import aliases
from megatron_moe.config.base import ConfigError, flag_name
from megatron_moe.config.flags import parse_run
from megatron_moe.config.run import RunConfig
from megatron_moe.config.schema import run_sections, section_fields

FLAGS = {
    flag_name(name): spec
    for section in run_sections(RunConfig).values()
    for name, spec in section_fields(section).items()
}


def _run(words: str) -> RunConfig:
    return parse_run(shlex.split(words), prog="pretrain", description="")[0]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--moe-loss-coeff 0.02", "--moe-aux-loss-coeff 0.02"),
        ("--moe-loss-coeff=0.02", "--moe-aux-loss-coeff 0.02"),
        ("--num-experts 4 --topk 2", "--num-experts 4 --moe-router-topk 2"),
        ("--moe-train-capacity-factor 1.5", "--moe-expert-capacity-factor 1.5"),
        ("--moe-expert-parallel-size 4", "--expert-model-parallel-size 4"),
        ("--vocab-file a.model --tokenizer-type ChineseBPETokenizer", "--tokenizer-model a.model"),
        ("--tokenizer-type=ChineseBPETokenizer", "--tokenizer-type SentencePieceTokenizer"),
        (
            "--tokenizer-type GPT2BPETokenizer --vocab-file v.json --merge-file m.txt",
            "--tokenizer-type GPT2BPETokenizer --tokenizer-model v.json --merge-file m.txt",
        ),
        ("--tokenizer-type HuggingFaceTokenizer", "--tokenizer-type HuggingFaceTokenizer"),
        ("--zero-1-memory-optimization", "--use-distributed-optimizer"),
        ("--mixed-precision", "--fp16"),
        ("--micro-batch 2", "--micro-batch-size 2"),
        ("--top-k-linear-strategy normal", "--router topk"),
        ("--top-k-linear-strategy lsoftmax --num-experts 4", "--router large-margin --num-experts 4"),
        ("--noisy-gate-policy RSample --num-experts 4", "--moe-router-noise rsample --num-experts 4"),
        ("--noisy-gate-policy Jitter", "--moe-input-jitter-eps 0.01"),
        (
            "--checkpoint-activations",
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        ),
        (
            "--recipe pai-gpt-moe-16b --disable-moe-token-dropping",
            "--recipe pai-gpt-moe-16b --moe-expert-capacity-factor none",
        ),
    ],
)
def test_aliases(theirs: str, ours: str) -> None:
    assert _run(theirs) == _run(ours)


def test_no_noisy_gate_switches_off_both_kinds_of_noise(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("moe: {num_experts: [4], moe_router_noise: rsample, moe_input_jitter_eps: 0.1}")
    moe = _run(f"--config {path} --noisy-gate-policy None").moe
    assert (moe.moe_router_noise, moe.moe_input_jitter_eps) == ("none", None)


def test_the_zeroclue_script() -> None:
    """The model flags of EasyNLP's run_finetune_gpt_moe.sh as they stand there."""
    run = _run(
        "--tokenizer-type ChineseBPETokenizer --vocab-file pai_chinese_bpe.model "
        "--tensor-model-parallel-size 1 --num-layers 24 --hidden-size 2048 --num-attention-heads 16 "
        "--seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 16 --lr 1e-4 --lr-decay-style cosine "
        "--lr-warmup-fraction 0.1 --min-lr 1e-6 --num-workers 0 --weight-decay 0.1 --clip-grad 1.0 "
        "--adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.014 --log-interval 1 --eval-interval 1000000 "
        "--eval-iters 10 --mixed-precision --hysteresis 2 --eod-mask-loss --checkpoint-activations "
        "--disable-moe-token-dropping --top-k-linear-strategy normal --num-experts 32 32 32 32 32 32 32 32 "
        "32 32 64 64 --mlp-type residual --moe-loss-coeff 0.01 --expert-interval 2"
    )
    assert run.moe.mlp_type == "residual"
    assert run.moe.experts_per_layer(24)[-1] == 64
    assert run.moe.moe_expert_capacity_factor is None
    assert run.data.tokenizer_type == "SentencePieceTokenizer"
    assert run.training.fp16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--topk 2 --moe-router-topk 2", "--topk and --moe-router-topk: both set --moe-router-topk"),
        ("--moe-router-topk 2 --topk 2", "--moe-router-topk and --topk: both set --moe-router-topk"),
        ("--vocab-file a --tokenizer-name-or-path b", "both set --tokenizer-model; give one of them"),
        ("--checkpoint-activations --recompute-method block", "both set --recompute-method"),
        (
            "--zero-1-memory-optimization --no-use-distributed-optimizer",
            "both set --use-distributed-optimizer",
        ),
        ("--checkpoint-activations=1", "--checkpoint-activations=1: takes no value"),
        ("--topk", "--moe-router-topk: needs an integer"),
        ("--zero-2-memory-optimization", "gradients are not sharded here; use --use-distributed-optimizer"),
        ("--DDP-impl local", "--DDP-impl: remove it"),
        ("--moe-eval-capacity-factor 1.0", "generation and scoring drop no tokens"),
        ("--tokenizer-type=BertWordPieceLowerCase", "--tokenizer-type BertWordPieceLowerCase: a decoder needs"),
        ("--merge-file a", "--merge-file: belongs to --tokenizer-type GPT2BPETokenizer, not to SentencePieceTokenizer"),
        ("--top-k-linear-strategy other", "--top-k-linear-strategy other: must be one of normal, standard, lsoftmax"),
        ("--lr-warmup-tokens 375e6", "--lr-warmup-tokens: use --lr-warmup-iters"),
    ],
)
def test_mistakes(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _run(words)
    assert message in str(caught.value)


def test_a_flag_may_be_given_twice() -> None:
    """A script's flags followed by the user's own: the last one counts, as in every Megatron script."""
    assert _run("--lr 1e-4 --lr 2e-4").optimizer.lr == 2e-4
    assert _run("--moe-loss-coeff 0.1 --moe-loss-coeff 0.2").moe.moe_aux_loss_coeff == 0.2


def test_every_target_is_a_flag() -> None:
    expansions = [
        *aliases.EXPANDED.values(),
        *(words for table in aliases.VALUES.values() for words in table.values()),
    ]
    targets = {
        *aliases.RENAMED.values(),
        *(word for words in expansions for word in words if word[:2] == "--"),
    }
    assert targets <= set(FLAGS)
    for words in expansions:
        _run(" ".join(words) + (" --num-experts 4" if "residual" in words else ""))


def test_no_alias_hides_a_flag() -> None:
    theirs = [*aliases.RENAMED, *aliases.EXPANDED, *aliases.REFUSED]
    assert not set(theirs) & set(FLAGS)
    assert len(theirs) == len(set(theirs))


def test_every_refusal_names_only_flags_that_exist() -> None:
    reasons = [
        *aliases.REFUSED.values(),
        *(text for table in aliases.REFUSED_VALUES.values() for text in table.values()),
    ]
    known = set(FLAGS) | {"--no-tensorboard", "--help", "--config"}
    for reason in reasons:
        words = {word.strip("();,.:") for word in reason.split() if word.lstrip("(").startswith("--")}
        assert words <= known, reason


def test_aliases_of_flags_that_a_parser_lacks_are_left_alone() -> None:
    assert aliases.translate(["--topk", "2"], {"--top-k"}) == ["--topk", "2"]
