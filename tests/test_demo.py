"""`make demo`, shrunk to a few steps: every stage of the main job on the real sample; a second call goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["--train-iters", "6", "--lr-warmup-iters", "2", "--eval-interval", "3", "--eval-iters", "1"]


def demo(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    # Six steps learn nothing yet: the margin is one that any model has.
    environment = {**os.environ, "PY": sys.executable, "DEMO_DIR": str(folder), "MARGIN": "-2"}
    return subprocess.run(
        ["bash", str(ROOT / "examples" / "demo.sh"), *SHORT, *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.mark.slow
def test_demo_runs_every_stage_and_goes_on_when_called_again(tmp_path: Path) -> None:
    first = demo(tmp_path)
    if "pip could not download it" in first.stderr:
        pytest.skip(f"the package registry cannot be reached: {first.stderr.strip()}")
    assert first.returncode == 0, first.stderr
    for expected in ("tensor 2, pipeline 2, expert 2", "step 6/6 | evaluation", "without context", "experts, layer 6"):
        assert expected in first.stdout
    assert "Warning" not in first.stderr
    run = tmp_path / "tiny-cpu"
    assert (run / "training.png").stat().st_size > 10_000
    assert "loads-slider" in (run / "training.html").read_text(encoding="utf-8")
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "6\n"
    assert (run / "evaluation.json").exists()
    again = demo(tmp_path, "--train-iters", "8")
    assert again.returncode == 0, again.stderr
    assert "resumed at step 6, after 96 samples" in again.stdout
    assert "step 8/8 | evaluation" in again.stdout
