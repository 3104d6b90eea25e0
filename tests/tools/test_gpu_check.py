"""`tools/gpu_check.sh` without a GPU, and with a stand-in interpreter that claims to have one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def gpu_check(root: Path, python: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(root / "tools" / "gpu_check.sh")],
        env={**os.environ, "PY": python},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with the script, one gpu test, and three benchmarks."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "gpu_check.sh").write_bytes((ROOT / "tools" / "gpu_check.sh").read_bytes())
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text("import pytest\n\n@pytest.mark.gpu\ndef test_one(): ...\n")
    (tmp_path / "tests" / "test_other.py").write_text("import not_installed_here\n")
    (tmp_path / "benchmarks").mkdir()
    for name in ("train_step", "moe_gpu", "tokenizer"):
        (tmp_path / "benchmarks" / f"{name}.py").write_text("")
    return tmp_path


def stand_in(folder: Path, *, fails: str = "nothing") -> str:
    """An interpreter that says yes to every question and logs what it is asked to run."""
    script = folder / "python"
    script.write_text(f'#!/bin/bash\necho "ran $*"\n[[ "$*" != *"{fails}"* ]]\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_exits_with_3() -> None:
    done = gpu_check(ROOT, sys.executable)
    assert done.returncode == 3
    assert done.stderr.startswith("gpu-check: no GPU: torch sees none here")
    assert len(done.stderr.splitlines()) == 1


def test_an_interpreter_without_torch_cannot_start(tree: Path) -> None:
    done = gpu_check(tree, stand_in(tree, fails="import torch"))
    assert done.returncode == 2
    assert "cannot import torch" in done.stderr


def test_runs_only_files_with_gpu_tests_and_the_benchmarks_of_a_gpu(tree: Path) -> None:
    done = gpu_check(tree, stand_in(tree))
    assert done.returncode == 0, done.stderr
    assert "ran -m pytest -m gpu tests/test_one.py\n" in done.stdout
    assert "ran benchmarks/train_step.py" in done.stdout
    assert "ran benchmarks/moe_gpu.py" in done.stdout
    assert "tokenizer" not in done.stdout
    assert done.stdout.rstrip().endswith("gpu-check passed")


def test_what_it_runs_needs_no_arguments() -> None:
    script = (ROOT / "tools" / "gpu_check.sh").read_text(encoding="utf-8")
    named = re.findall(r"benchmarks/\w+\.py", script)
    assert len(named) == 2
    for name in named:
        source = (ROOT / name).read_text(encoding="utf-8")
        assert "required=True" not in source
        assert '"cuda"' in source


def test_a_failed_benchmark_fails_the_whole_but_stops_nothing(tree: Path) -> None:
    done = gpu_check(tree, stand_in(tree, fails="benchmarks/train_step.py"))
    assert done.returncode == 1
    assert "ran benchmarks/moe_gpu.py" in done.stdout
    assert "failed: benchmarks/train_step.py" in done.stderr


def test_a_tree_without_gpu_tests_is_a_failure(tree: Path) -> None:
    (tree / "tests" / "test_one.py").unlink()
    done = gpu_check(tree, stand_in(tree))
    assert done.returncode == 1
    assert "tests (none found)" in done.stderr


def test_carried_wheels_are_unpacked_when_megatron_core_is_missing(tree: Path) -> None:
    (tree / ".whl").mkdir()
    (tree / ".whl" / "megatron_core-0.19.2-py3-none-any.whl").write_text("")
    done = gpu_check(tree, stand_in(tree, fails="megatron.core.package_info"))
    assert done.returncode == 0, done.stderr
    assert "-m pip install -q --no-index --no-deps" in done.stdout
    assert ".whl/megatron_core-0.19.2-py3-none-any.whl" in done.stdout


def test_without_megatron_core_and_wheels_it_says_what_to_do(tree: Path) -> None:
    done = gpu_check(tree, stand_in(tree, fails="megatron.core.package_info"))
    assert done.returncode == 2
    assert "put its wheel into .whl/" in done.stderr
