"""docs/checkpoints.md and its Chinese twin: the commands run, flags, classes and files exist, both say the same."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.checkpoint.hf.targets import FAMILIES
from tests.helpers.distributed import run_ranks
from tests.helpers.pages import assert_twins
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve
from tests.test_readme import ROOT, blocks, commands, unknown_flags

ENGLISH, CHINESE = ROOT / "docs" / "checkpoints.md", ROOT / "docs" / "checkpoints.zh-CN.md"


def test_flags_of_every_command_exist() -> None:
    found = [words for kind in ("bash", "sh") for block in blocks(ENGLISH, kind) for words in commands(block)]
    ours = [words for words in found if words[0] != "pip" and "make" not in words]
    assert len(ours) == len(found) - 3 == 11
    for words in ours:
        assert not unknown_flags(words), shlex.join(words)


def test_every_class_and_file_that_is_named_exists() -> None:
    text = ENGLISH.read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+(?:ForCausalLM|HeadModel))`", text)) - {"AutoModelForCausalLM"}
    assert named == {family.architecture for family in FAMILIES} - {"MistralForCausalLM"}
    for name in re.findall(r"`(examples/\w+\.sh)`", text):
        assert (ROOT / name).is_file(), name


def test_both_pages_have_the_same_commands_tables_and_numbers() -> None:
    assert_twins(ENGLISH, CHINESE, ("bash", "sh", "text"))


@pytest.mark.slow
def test_commands_run(tiny_data: Path, tmp_path: Path) -> None:
    """The first block as it stands, on a model of four small layers."""
    run = tiny_run(
        **data_flags(tiny_data), train_iters=1, max_position_embeddings=128, save=str(tmp_path / "runs" / "tiny")
    )
    run_ranks(1, train_curve, run)
    block, *others = blocks(ENGLISH, "bash")
    assert not others
    done = subprocess.run(
        ["bash", "-euc", block.replace("python", shlex.quote(sys.executable)).replace("tools/", f"{ROOT}/tools/")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("0 missing, 0 unexpected, 0 mismatched keys") == 3
    assert "北京" in done.stdout.rpartition("hold the same numbers")[2]
