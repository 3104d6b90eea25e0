"""The launcher: a mistake is one line on the screen however many ranks make it, and the exit code is theirs."""

import subprocess
import sys
from pathlib import Path

import pytest


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_moe.torchrun", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_mistake_of_all_ranks_is_one_line_and_code_2() -> None:
    done = launch("-m", "megatron_moe.pretrain", "--num-layer", "3")
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: --num-layer: unknown flag; did you mean --num-layers?"]


@pytest.mark.parametrize(
    ("action", "code", "line"),
    [
        ("os._exit(7)", 7, "error: rank 1 ended with exit code 7; its output is above"),
        ("os.kill(os.getpid(), 9)", 137, "error: rank 1 ended with signal 9; its output is above"),
    ],
    ids=["code", "signal"],
)
def test_one_rank_that_dies_takes_the_others_down(tmp_path: Path, action: str, code: int, line: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(f"import os, time\nif os.environ['RANK'] == '1':\n    {action}\ntime.sleep(300)\n")
    done = launch(str(script))
    assert done.returncode == code
    assert done.stderr.splitlines() == [line]
