"""How an entry point ends: one line and code 2 for a mistake, a traceback only where it is asked for."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import DistBackendError, DistNetworkError
from torch.distributed.checkpoint.api import CheckpointException

from megatron_moe.config.base import UserError
from megatron_moe.runtime.launch import AnotherRankFailed, lost_connection

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


# ---- who speaks

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:18372"


def caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(GLOO), True),
        (DistNetworkError("The client socket has failed to recv, got 0 bytes: Failed to recv, got 0 bytes"), True),
        (DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (caused_by(UserError("iter_1: damaged checkpoint"), RuntimeError(GLOO)), True),
        (CheckpointException("read", {0: (RuntimeError(GLOO), None), 1: (RuntimeError(GLOO), None)}), True),
        (AnotherRankFailed("rank 2 could not save"), True),
        # What must never be taken for it.
        (RuntimeError("a bug"), False),
        (RuntimeError("wandb: Connection refused"), False),
        (OSError(104, "Connection reset by peer"), False),
        (DistBackendError("NCCL error: invalid argument"), False),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:1] Timed out waiting 600000ms"), False),
        (CheckpointException("write", {0: (RuntimeError(GLOO), None), 1: (OSError(28, "full"), None)}), False),
        (CheckpointException("write", {}), False),
        (caused_by(UserError("--save: full"), OSError(28, "full")), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_lost_connection(error: BaseException, lost: bool) -> None:
    assert lost_connection(error) is lost


def test_broken_connection_of_a_single_process_is_no_excuse(tmp_path: Path) -> None:
    done = run(tmp_path, f"raise RuntimeError({GLOO!r})")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_every_rank_can_ask_whether_another_failed(tmp_path: Path) -> None:
    body = """
import os, time
from megatron_moe.runtime.launch import another_rank_failed
assert not another_rank_failed()
if os.environ["RANK"] == "1":
    time.sleep(1)
    raise RuntimeError("a bug")
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
began = time.monotonic()
while not another_rank_failed() and time.monotonic() - began < 60:
    time.sleep(0.05)
print("knows" if another_rank_failed() else "does not know", flush=True)
os._exit(0)
""".strip()
    done = run(tmp_path, body, launcher=TORCHRUN)
    assert "knows" in done.stdout.splitlines()


@pytest.mark.slow
def test_real_reason_goes_over_a_lost_connection(tmp_path: Path) -> None:
    """A rank may notice the loss before the one that failed has said why."""
    body = f"""
import os, time
from megatron_moe.runtime import launch
launch.GRACE_SECONDS = 3
if os.environ["RANK"] == "0":
    raise RuntimeError({GLOO!r})
time.sleep(1)
{MISTAKE}
""".strip()
    done = run(tmp_path, body, launcher=TORCHRUN)
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == ["error: --flag 3: must be 4"]
