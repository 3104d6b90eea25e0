"""The command line: what is accepted, what wins, and what each mistake says."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import LaunchOptions, parse_run, parse_sections
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.schema import run_sections, section_fields


def _run(words: str) -> RunConfig:
    return parse_run(words.split(), prog="python -m megatron_moe.pretrain", description="Pretrain.")[0]


def test_nothing_given_is_all_defaults() -> None:
    assert _run("") == RunConfig()


def test_every_kind_of_flag() -> None:
    run = _run(
        "--num-layers 6 --lr 1e-4 --num-experts 4 4 8 --expert-interval=2 --normalization RMSNorm "
        "--data-path 0.3 a 0.7 b --bf16 --no-tensorboard --no-moe-router-pre-softmax --moe-router-topk 2"
    )
    assert run.model.num_layers == 6
    assert run.optimizer.lr == 1e-4
    assert run.moe.num_experts == (4, 4, 8)
    assert run.moe.expert_interval == 2
    assert run.model.normalization == "RMSNorm"
    assert run.data.data_path == ("0.3", "a", "0.7", "b")
    assert run.training.bf16
    assert not run.logging.tensorboard
    assert run.moe.moe_router_pre_softmax is False


def test_switch_whose_name_begins_with_no() -> None:
    assert _run("--load a --no-load-optim").checkpoint.no_load_optim
    assert not _run("--load a --no-load-optim --no-no-load-optim").checkpoint.no_load_optim


def test_none_unsets_an_optional_flag() -> None:
    run = _run("--recipe pai-gpt-moe-16b --moe-expert-capacity-factor none --num-query-groups none")
    assert run.moe.moe_expert_capacity_factor is None
    assert _run("--num-experts none").moe.num_experts is None


def test_precedence(tmp_path: Path) -> None:
    """Defaults, then the recipe, then the file, then the flags, field by field."""
    config = tmp_path / "a.yaml"
    config.write_text("model: {num_layers: 12, hidden_size: 256}\noptimizer: {lr: 5e-4}\n")
    run = _run(f"--num-layers 4 --recipe pai-gpt-moe-16b --config {config} --num-experts 2 2")
    assert run.model.num_layers == 4
    assert run.model.hidden_size == 256
    assert run.optimizer.lr == 5e-4
    assert run.model.vocab_size == 50000
    assert run.moe.num_experts == (2, 2)
    assert run.logging.log_interval == 1


def test_a_flag_equal_to_its_default_still_overrides() -> None:
    assert _run("--recipe pai-gpt-moe-16b --num-layers 4 --num-experts 4").model.num_layers == 4


def test_launch_options() -> None:
    _, launch = parse_run([], prog="p", description="")
    assert launch == LaunchOptions(dry_run=False, world_size=None, debug=False)
    _, launch = parse_run(["--dry-run", "--world-size", "8", "--debug"], prog="p", description="")
    assert launch == LaunchOptions(dry_run=True, world_size=8, debug=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-layer 3", "--num-layer: unknown flag; did you mean --num-layers?"),
        ("--num_layers 3", "--num_layers: unknown flag; did you mean --num-layers?"),
        ("--num-layer=3", "--num-layer: unknown flag; did you mean --num-layers?"),
        ("--num-lay 3", "--num-lay: unknown flag; did you mean --num-layers?"),
        ("--xyzzy", "--xyzzy: unknown flag; --help lists the flags"),
        ("-x", "-x: unknown flag; --help lists the flags"),
        ("--num-layers many", "--num-layers many: must be an integer"),
        ("--num-layers 3.5", "--num-layers 3.5: must be an integer"),
        ("--num-experts 4 32x10", "--num-experts 32x10: must be integers"),
        ("--lr nan", "--lr nan: must be a finite number"),
        ("--lr inf", "--lr inf: must be a finite number"),
        ("--num-layers", "--num-layers: needs an integer"),
        ("--num-experts --bf16", "--num-experts: needs one or more values: integers"),
        ("--num-experts none 4", "--num-experts: `none` unsets the flag and stands alone"),
        (
            "--lr-decay-style cosin",
            "--lr-decay-style cosin: must be one of constant, linear, cosine, inverse-square-root, WSD; "
            "did you mean cosine?",
        ),
        ("--bf16 true", "--bf16 true: takes no value; --bf16 is a switch"),
        ("--bf16=true", "--bf16: takes no value; --bf16 turns it on, --no-bf16 off"),
        ("stray", "stray: stands alone; a value follows its flag, and --help lists the flags"),
        ("--lr 1e-4 stray", "stray: stands alone; a value follows its flag, and --help lists the flags"),
        ("--world-size 3", "--world-size 3: must be at least 1, and only goes with --dry-run"),
        ("--dry-run --world-size 0", "--world-size 0: must be at least 1, and only goes with --dry-run"),
        ("--config missing.yaml", "missing.yaml: cannot be read: No such file or directory"),
        ("--hidden-size 0", "--hidden-size 0: must be at least 1"),
        ("--bf16 --fp16", "--bf16 and --fp16: give one of them"),
        ("--loss-scale 8", "--loss-scale 8.0: needs --fp16"),
        ("--recompute-num-layers 1", "--recompute-num-layers 1: needs --recompute-granularity full"),
        (
            "--num-experts 4 --moe-router-bias-update-rate 0.1",
            "--moe-router-bias-update-rate 0.1: needs --moe-router-enable-expert-bias",
        ),
        (
            "--num-experts 4 --no-moe-router-pre-softmax",
            "--no-moe-router-pre-softmax: needs --moe-router-topk of at least 2; with one expert the weight "
            "would always be 1",
        ),
        (
            "--moe-router-topk 2 --num-experts 4 --moe-router-topk-scaling-factor 2",
            "--moe-router-topk-scaling-factor 2.0: needs --moe-router-pre-softmax or "
            "--moe-router-score-function sigmoid",
        ),
    ],
)
def test_mistakes(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _run(words)
    assert str(caught.value) == message


def test_unknown_recipe_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"--recipe tiny: unknown; did you mean tiny-cpu\? There are: .*pr-moe-350m"):
        _run("--recipe tiny")


def test_a_mistake_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError):
        _run("--num-layers")
    assert capsys.readouterr() == ("", "")


def test_help_begins_with_an_example_and_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _run("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith("Example:\n  python -m megatron_moe.pretrain --recipe tiny-cpu ")
    for section in run_sections(RunConfig).values():
        for spec in section_fields(section).values():
            assert re.search(rf"^  {spec.flag}\b", text, re.MULTILINE), spec.flag
            assert spec.help, spec.flag
    assert "(default: 4)" in text
    assert "--lr-decay-style {constant,linear,cosine,inverse-square-root,WSD}" in text


def test_the_example_of_help_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _run("--help")
    example = capsys.readouterr().out.splitlines()[1]
    run = _run(example.split("megatron_moe.pretrain ")[1])
    assert run.data.tokenizer_model == "data/tokenizer/tokenizer.model"
    assert run.checkpoint.save == "runs/tiny"


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Flags of a test program."""

    load: str
    """The run to load, 100% of it."""
    top_k: int = 0
    """Keep this many."""
    style: Literal["greedy", "sample"] = "greedy"
    """How."""


SERVE = {"serve": ServeConfig, "parallel": ParallelConfig}


def test_sections_of_other_programs() -> None:
    sections, debug = parse_sections(
        ["--load", "runs/a", "--top-k", "5", "--tensor-model-parallel-size", "2"],
        SERVE,
        prog="serve",
        description="",
    )
    assert sections["serve"] == ServeConfig(load="runs/a", top_k=5)
    assert sections["parallel"].tensor_model_parallel_size == 2
    assert debug is False
    assert parse_sections(["--load", "a", "--debug"], SERVE, prog="serve", description="")[1] is True


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--top-k 5", "--load: is required: The run to load, 100% of it."),
        ("--load a --recipe b", "--recipe: unknown flag; --help lists the flags"),
        ("--load a --topk 2", "--topk: unknown flag; did you mean --top-k?"),
        ("--load a --style fast", "--style fast: must be one of greedy, sample"),
    ],
)
def test_mistakes_in_other_programs(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sections(words.split(), SERVE, prog="serve", description="")
    assert str(caught.value) == message


def test_help_of_other_programs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_sections(["--help"], SERVE, prog="serve", description="Serve.", example="serve --load runs/a")
    text = capsys.readouterr().out
    assert text.startswith("Example:\n  serve --load runs/a\n\nServe.")
    assert "100% of it" in text
    assert "serve (Flags of a test program)" in text


def test_one_flag_in_two_sections_is_a_mistake_of_the_programmer() -> None:
    with pytest.raises(TypeError, match="--load is defined by both a and b"):
        parse_sections([], {"a": ServeConfig, "b": ServeConfig}, prog="serve", description="")
