"""docs/dispatch.md and its Chinese twin: the commands run, the flags exist, both say the same."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.pages import assert_twins
from tests.test_readme import ROOT, blocks, commands, unknown_flags

ENGLISH, CHINESE = ROOT / "docs" / "dispatch.md", ROOT / "docs" / "dispatch.zh-CN.md"
SMALLER = (
    "--num-layers 4 --hidden-size 32 --num-experts 4 8 --seq-length 32 --global-batch-size 4 --train-iters 2 "
    "--lr-warmup-iters 0 --eval-interval 0 --micro-batch-size 1 --device cpu"
)


def commands_of_the_page() -> list[list[str]]:
    return [words for block in blocks(ENGLISH, "bash") for words in commands(block)]


def test_flags_of_every_command_exist() -> None:
    found = commands_of_the_page()
    assert len(found) == 3
    for words in found:
        assert not unknown_flags(words), shlex.join(words)


def test_every_flag_and_file_that_is_named_exists() -> None:
    from megatron_moe.config.run import RunConfig
    from megatron_moe.config.schema import run_sections, section_fields

    text = ENGLISH.read_text(encoding="utf-8")
    known = {field.flag for section in run_sections(RunConfig).values() for field in section_fields(section).values()}
    beside = {"--recipe", "--nproc-per-node", "--dry-run", "--measure", "--machine"}
    assert set(re.findall(r"--[a-z][a-z0-9-]*[a-z0-9]", text)) <= known | beside
    for name in re.findall(r"`((?:moe|benchmarks)/[\w/]+\.py)`", text):
        assert (ROOT / "megatron_moe" / name).is_file() or (ROOT / name).is_file(), name
    for name in re.findall(r"\]\((img/[\w.]+)\)", text):
        assert (ROOT / "docs" / name).is_file(), name


def test_both_pages_have_the_same_commands_tables_and_numbers() -> None:
    assert_twins(ENGLISH, CHINESE, ("bash",))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
def test_commands_of_four_ranks_run(number: int, tiny_data: Path, tmp_path: Path) -> None:
    """As they stand on the page, on fewer and smaller sequences."""
    words = [
        word.replace("data/train", f"{tiny_data}/train")
        .replace("data/domains", f"{tiny_data}/train")
        .replace("data/heldout", f"{tiny_data}/valid")
        .replace("data/tokenizer/tokenizer.model", f"{tiny_data}/bpe.model")
        for word in commands_of_the_page()[number]
    ]
    program = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "megatron_moe.torchrun"]
    done = subprocess.run(
        [*program, *words[1:], *shlex.split(SMALLER)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout
    assert list((tmp_path / "runs").glob("*/iter_0000002"))
