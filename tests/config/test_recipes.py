"""Every packaged recipe is complete, valid, and what it says."""

from importlib import resources

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import parse_run
from megatron_moe.config.validate import validate
from megatron_moe.config.yaml_io import build_run, load_recipe, recipe_names
from megatron_moe.model.dry_run import report

NAMES = (
    "gpt-125m-moe64",
    "hunyuan-large",
    "pai-gpt-moe-13b",
    "pai-gpt-moe-16b",
    "pangu-sigma",
    "pr-moe-1.3b",
    "pr-moe-350m",
    "qwen3-moe-30b-a3b",
    "tiny-cpu",
)


def test_the_names() -> None:
    assert tuple(recipe_names()) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world_size", [1, 4])
def test_every_recipe_is_valid(name: str, world_size: int) -> None:
    validate(build_run(load_recipe(name)), world_size)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_where_it_comes_from(name: str) -> None:
    text = (resources.files("megatron_moe.config") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert all(len(line) <= 120 for line in text.splitlines())


def test_tiny_cpu_on_four_processes_with_every_kind_of_parallelism() -> None:
    words = (
        "--recipe tiny-cpu --vocab-size 4000 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"
    )
    run, _ = parse_run(words.split(), prog="pretrain", description="")
    assert run.moe.experts_per_layer(run.model.num_layers) == (0, 4, 0, 4, 0, 8)
    assert "4 processes: TP 2, PP 2, CP 1, DP 1, EP 2, ETP 1, expert DP 1" in report(run, 4)


def test_unknown_name() -> None:
    with pytest.raises(ConfigError, match=r"--recipe pr-moe-35m: unknown; did you mean pr-moe-350m\?"):
        load_recipe("pr-moe-35m")
    with pytest.raises(ConfigError, match=r"--recipe xyzzy: unknown; There are: gpt-125m-moe64, "):
        load_recipe("xyzzy")


@pytest.mark.parametrize("name", ["../tiny-cpu", "tiny-cpu.yaml", "", "/etc/passwd"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        load_recipe(name)
