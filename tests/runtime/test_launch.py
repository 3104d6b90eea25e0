"""How an entry point ends: one line and code 2 for a mistake, a traceback only where it is asked for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENTRY = """
import sys
from megatron_moe.config.base import UserError
from megatron_moe.runtime.launch import run_entry_point

def main(words):
    {body}

run_entry_point(main)
"""
MISTAKE = 'raise UserError("--flag 3: must be 4")'


def write(folder: Path, body: str) -> Path:
    script = folder / "entry.py"
    script.write_text(ENTRY.format(body=body.replace("\n", "\n    ")), encoding="utf-8")
    return script


def run(folder: Path, body: str, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *launcher, str(write(folder, body)), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, MISTAKE)
    assert done.returncode == 2
    assert done.stderr == "error: --flag 3: must be 4\n"
    assert done.stdout == ""


def test_debug_shows_where(tmp_path: Path) -> None:
    done = run(tmp_path, MISTAKE, "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "must be 4" in done.stderr


def test_a_bug_is_not_disguised_as_a_mistake(tmp_path: Path) -> None:
    done = run(tmp_path, 'raise RuntimeError("a bug")')
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_words_are_handed_on_and_output_is_flushed(tmp_path: Path) -> None:
    done = run(tmp_path, f'print(*words, end="")\n{MISTAKE}', "a", "--b")
    assert done.stdout == "a --b"
    assert done.returncode == 2


def test_interrupt_ends_without_a_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, "raise KeyboardInterrupt")
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_success_is_zero(tmp_path: Path) -> None:
    assert run(tmp_path, "pass").returncode == 0


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        MISTAKE,
        # Only one rank meets it; the other waits for it, and must not wait for long.
        f'import os, time\nif os.environ["RANK"] == "1":\n    {MISTAKE}\ntime.sleep(100)',
        # One is late.
        f'import os, time\ntime.sleep(float(os.environ["RANK"]))\n{MISTAKE}',
    ],
    ids=["all ranks", "rank 1 only", "one after the other"],
)
def test_torchrun_prints_it_once_and_fails(body: str, tmp_path: Path) -> None:
    began = time.monotonic()
    done = run(tmp_path, body, launcher=TORCHRUN)
    assert time.monotonic() - began < 60, "the rank that met no mistake was waited for"
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == ["error: --flag 3: must be 4"]


@pytest.mark.slow
def test_mistake_while_another_rank_waits_in_a_collective(tmp_path: Path) -> None:
    """The rank that got through is stopped in its all-reduce."""
    body = """
import os
import torch
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.runtime import distributed
world = distributed.start(ParallelConfig(device="cpu"))
if world.rank == 0:
    raise UserError("--data-path: only here")
torch.distributed.all_reduce(torch.ones(1))
""".strip()
    began = time.monotonic()
    done = run(tmp_path, body, launcher=TORCHRUN)
    assert time.monotonic() - began < 60
    assert done.returncode != 0
    assert done.stderr.count("error: --data-path: only here") == 1
