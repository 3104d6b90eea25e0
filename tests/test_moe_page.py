"""docs/moe.md and its Chinese twin: the same commands and numbers in both; the router that it adds trains."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.pages import assert_twins
from tests.test_readme import ROOT, blocks, commands, unknown_flags

ENGLISH, CHINESE = ROOT / "docs" / "moe.md", ROOT / "docs" / "moe.zh-CN.md"


def test_flags_of_every_command_exist() -> None:
    lines = [words for block in blocks(ENGLISH, "bash") for words in commands(block)]
    assert len(lines) >= 2
    for words in lines:
        assert not unknown_flags(words), shlex.join(words)


def test_every_flag_that_is_named_exists() -> None:
    """In the text too, where no command is run."""
    from megatron_moe.config import aliases
    from megatron_moe.config.run import RunConfig
    from megatron_moe.config.schema import run_sections, section_fields

    known = {field.flag for section in run_sections(RunConfig).values() for field in section_fields(section).values()}
    theirs = {*aliases.RENAMED, *aliases.EXPANDED, *aliases.VALUES}
    outside = {flag for block in blocks(ENGLISH, "bash") for words in commands(block) for flag in words}
    named = re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", ENGLISH.read_text(encoding="utf-8"))
    assert {flag.replace("--no-", "--") for flag in named} <= known | theirs | outside | {
        "--help",
        "--dry-run",
        "--domain",
        "--domain-key",
        "--domains",
        "--sources",
    }


def test_every_router_has_a_section_and_a_line_in_the_table() -> None:
    from megatron_moe.config.routers import ROUTERS

    text = ENGLISH.read_text(encoding="utf-8")
    for name in ROUTERS:
        assert f"| `{name}` |" in text, name
        assert f"### `{name}`" in text, name


def test_both_pages_have_the_same_commands_tables_and_numbers() -> None:
    assert_twins(ENGLISH, CHINESE, ("bash", "python"))


@pytest.mark.slow
def test_the_router_that_the_page_adds_trains(tiny_data: Path, tmp_path: Path) -> None:
    """In a copy of the package, with the file and the line as they stand on the page."""
    shutil.copytree(ROOT / "megatron_moe", tmp_path / "megatron_moe", ignore=shutil.ignore_patterns("__pycache__"))
    router, line = blocks(ENGLISH, "python")
    (tmp_path / "megatron_moe/moe/routers/cosine.py").write_text(router, encoding="utf-8")
    registry = tmp_path / "megatron_moe/config/routers.py"
    text = registry.read_text(encoding="utf-8")
    registry.write_text(text.replace('    "topk":', line + '\n    "topk":', 1), encoding="utf-8")
    words = (
        "-m megatron_moe.pretrain --device cpu --num-layers 2 --hidden-size 32 --seq-length 32 --num-experts 4 8 "
        "--router cosine --train-iters 2 --eval-interval 0 --save run --train-data-path {0}/train "
        "--tokenizer-model {0}/bpe.model"
    )
    done = subprocess.run(
        [sys.executable, *shlex.split(words.format(shlex.quote(str(tiny_data))))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "router: cosine" in (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "step 2/2" in done.stdout
