"""The benchmarks run to their end and print both sides; what they measure is no test's business."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_train_step_prints_both_sides_and_that_they_agree() -> None:
    command = [sys.executable, "benchmarks/train_step.py", "--model", "tiny-cpu", "--steps", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    head, product, ours, stock, ratio, difference = done.stdout.splitlines()
    assert head.startswith("tiny-cpu: 4.3 M parameters")
    assert "GFLOP/s" in product
    for name, line in (("ours", ours), ("stock", stock)):
        assert line.split()[0] == name
        assert all(unit in line for unit in ("ms", "tokens/s", "GiB"))
    assert ratio.split()[0] == "ratio"
    # The same mathematics on both sides, or the ratio means nothing.
    assert float(difference.split()[-1]) < 1e-5
