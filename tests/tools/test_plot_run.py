"""plot_run draws runs of any shape, and says in one line what is wrong with a run's files."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.config.base import UserError
from tools import plot_run

pytest.importorskip("matplotlib")


def write_run(folder: Path, steps: int, experts: Mapping[int, int], every: int = 1) -> Path:
    """A run's two files: layer -> number of experts."""
    folder.mkdir()
    metrics, loads = [], []
    for step in range(every, steps * every + 1, every):
        metrics.append({"step": step, "lm_loss": 8.0 - step * 0.01})
        metrics.append({"step": step, "eval_lm_loss": 8.0}) if step % 5 == 0 else None
        for layer, count in experts.items():
            loads.append(
                {
                    "step": step,
                    "layer": layer,
                    "tokens": [step + index for index in range(count)],
                    "dropped": 1,
                }
            )
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "expert_load.jsonl", loads)
    return folder


def write_lines(path: Path, entries: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


@pytest.mark.parametrize(
    ("steps", "every", "experts"),
    [(60, 1, {2: 4, 4: 4, 6: 8}), (1, 1, {1: 1}), (3, 10, {}), (5, 2, dict.fromkeys(range(7), 64))],
)
def test_a_picture_comes_out(tmp_path: Path, steps: int, every: int, experts: dict[int, int]) -> None:
    run = write_run(tmp_path / "run", steps, experts, every)
    output = tmp_path / "deep" / "run.png"
    plot_run.main(["--run", str(run), "--output", str(output), "--unigram-entropy", "7.1"])
    assert output.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.parent.iterdir()) == ["run.html", "run.png"]
    page = output.with_suffix(".html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert ('id="loads-data"' in page) == bool(experts)


def test_a_dense_run_without_expert_load(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3, {})
    (run / "expert_load.jsonl").unlink()
    plot_run.main(["--run", str(run), "--output", str(tmp_path / "run.png")])
    assert (tmp_path / "run.png").exists()


def test_names_of_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", 3, {2: 4})
    plot_run.main([str(run)])
    assert capsys.readouterr().out == f"{run}/training.png, {run}/training.html: 3 steps, 1 MoE layers\n"
    (run / "training.png").unlink()
    plot_run.main([str(run), "--page-only", "--page", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").exists()
    assert not (run / "training.png").exists()
    with pytest.raises(UserError, match=r"--output .*x\.html: is the page's name too; give another, such as x\.png"):
        plot_run.main([str(run), "--output", str(tmp_path / "x.html")])
    for words in ([], [str(run), "--run", str(run)]):
        with pytest.raises(SystemExit):
            plot_run.main(words)
        assert capsys.readouterr().err == "error: give one run's directory (see --help)\n"


def test_mistakes_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3, {2: 4})
    arguments = ["--run", str(run), "--output", str(tmp_path / "run.png")]
    with pytest.raises(UserError, match=r"--run .*: holds no metrics\.jsonl"):
        plot_run.main(["--run", str(tmp_path), "--output", "x.png"])
    write_lines(
        run / "expert_load.jsonl",
        [{"step": 1, "layer": 2, "tokens": [1, 2]}, {"step": 2, "layer": 2, "tokens": [1]}],
    )
    with pytest.raises(UserError, match=r"expert_load\.jsonl line 2: layer 2 has another number of experts"):
        plot_run.main(arguments)
    write_lines(run / "metrics.jsonl", [{"step": 1}])
    with pytest.raises(UserError, match="no line has an lm_loss"):
        plot_run.main(arguments)
    (run / "metrics.jsonl").write_text("{bad\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1: not JSON"):
        plot_run.main(arguments)


def test_missing_matplotlib_gives_the_install_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3, {})
    program = "import sys; sys.modules['matplotlib'] = None; from tools.plot_run import *; run_tool(main)"
    command = [sys.executable, "-c", program, "--run", str(run), "--output", str(tmp_path / "x.png")]
    root = Path(plot_run.__file__).parents[1]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: plot_run needs matplotlib: pip install matplotlib, or give --page-only\n"
