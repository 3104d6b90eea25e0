"""A few of the failures through the real launcher, `python -m megatron_moe.torchrun`: its processes, store and signals.

tests/helpers/launch.py stands in for it in the other tests, because every start of it imports torch once a rank.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_input.cases import BASE, Place, snapshot
from tests.helpers.launch import ROOT

pytestmark = pytest.mark.slow
# Starts the trainer with a rank that fails, as the other tests do.
SCRIPT = """
import runpy, sys
sys.path.insert(0, {root!r})
from megatron_moe.runtime.quiet import silence_third_party_warnings
silence_third_party_warnings()
from tests.bad_input.test_failing_rank import fail_at
fail_at({where!r}, {how!r}, 1)
runpy.run_module("megatron_moe.pretrain", run_name="__main__", alter_sys=True)
"""


def torchrun(ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_moe.torchrun", "--standalone", "--nproc-per-node", str(ranks), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def failing(place: Place, where: str, how: str, ranks: int) -> subprocess.CompletedProcess[str]:
    script = place.folder / "train.py"
    script.write_text(SCRIPT.format(root=str(ROOT), where=where, how=how), encoding="utf-8")
    return torchrun(ranks, str(script), *place.fill(f"{BASE} --train-iters 50").split())


def test_file_that_is_missing(place: Place) -> None:
    Path(f"{place.data}/train.bin").unlink()
    before = snapshot(place.folder)
    done = torchrun(4, "-m", "megatron_moe.pretrain", *place.fill(f"{BASE} --save {{tmp}}/new").split())
    problem = "no file {data}/train.bin; write it with tools/preprocess_data.py"
    assert done.stderr == place.fill(f"error: --train-data-path {{data}}/train: {problem}\n")
    assert done.returncode == 2
    assert snapshot(place.folder) == before


def test_mistake_of_one_rank_in_training(place: Place) -> None:
    done = failing(place, "step", "mistake", 2)
    assert done.stderr == "error: --train-data-path here/only: no file here/only.idx on rank 2\n"
    assert done.returncode == 2


def test_bug_of_one_rank_in_training(place: Place) -> None:
    done = failing(place, "step", "bug", 2)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-2:] == [
        "RuntimeError: a bug of rank 2",
        "error: rank 1 ended with exit code 1; its output is above",
    ]
    assert done.returncode == 1


def test_rank_that_is_killed_in_training(place: Place) -> None:
    done = failing(place, "step", "killed", 2)
    assert done.stderr == "error: rank 1 ended with signal 9; its output is above\n"
    assert done.returncode == 128 + signal.SIGKILL
