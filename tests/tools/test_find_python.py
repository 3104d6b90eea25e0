"""How `make` finds its Python: fake interpreters on a fake PATH, and the real one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "find_python.sh"
# The script is run by its full path, as the PATH under test holds nothing but fakes.
SHELL = "/bin/sh"


def fake_python(path: Path, *, good: bool) -> Path:
    """A program that passes or fails the script's test and, asked for `sys.executable`, names itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!{SHELL}\ncase "$2" in *print*) echo "{path}" ;; esac\nexit {0 if good else 1}\n')
    path.chmod(0o755)
    return path


def find(bin_folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SHELL, str(SCRIPT), *arguments],
        env={"PATH": str(bin_folder), "HOME": str(bin_folder.parent), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_prefers_python3_12(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python3", good=True)
    wanted = fake_python(tmp_path / "bin" / "python3.12", good=True)
    assert find(tmp_path / "bin").stdout.strip() == str(wanted)


def test_takes_python3_when_it_is_new_enough(tmp_path: Path) -> None:
    wanted = fake_python(tmp_path / "bin" / "python3", good=True)
    assert find(tmp_path / "bin").stdout.strip() == str(wanted)


def test_passes_over_a_shim_that_fails_to_pyenvs_own_folder(tmp_path: Path) -> None:
    """pyenv's shim exists but answers 'command not found' unless that version is selected here."""
    fake_python(tmp_path / "bin" / "python3.12", good=False)
    fake_python(tmp_path / "bin" / "python3", good=False)
    wanted = fake_python(tmp_path / "pyenv" / "versions" / "3.12.4" / "bin" / "python3.12", good=True)
    found = find(tmp_path / "bin", PYENV_ROOT=str(tmp_path / "pyenv"))
    assert found.stdout.strip() == str(wanted)


def test_looks_into_the_home_folders_pyenv(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    wanted = fake_python(tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3.12", good=True)
    assert find(tmp_path / "bin").stdout.strip() == str(wanted)


def test_says_in_one_line_what_to_install(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python3", good=False)
    found = find(tmp_path / "bin")
    assert found.returncode == 1
    assert found.stdout == ""
    assert len(found.stderr.strip().splitlines()) == 1
    assert "install python3.12" in found.stderr


def test_a_named_interpreter_is_the_only_one_tried(tmp_path: Path) -> None:
    fake_python(tmp_path / "bin" / "python3.12", good=True)
    bad = fake_python(tmp_path / "old", good=False)
    found = find(tmp_path / "bin", str(bad))
    assert found.returncode == 1
    assert f"PYTHON={bad}" in found.stderr


def test_a_real_interpreter_passes_the_real_test(tmp_path: Path) -> None:
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    if not base.exists():
        pytest.skip(f"no interpreter at {base}")
    found = subprocess.run([SHELL, str(SCRIPT), str(base)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert os.path.samefile(found.stdout.strip(), base)


def test_make_stops_before_anything_is_made(tmp_path: Path) -> None:
    """With no usable Python, `make venv` prints the one line and leaves no half-made folder."""
    root = SCRIPT.parents[1]
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "setup.py"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "find_python.sh").write_bytes(SCRIPT.read_bytes())
    # The make that may have started this test passes its own variables on.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "NO_VENV")}
    made = subprocess.run(
        ["make", "venv", "PYTHON=/nonexistent/python"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode != 0
    assert "PYTHON=/nonexistent/python: not a Python >= 3.12" in made.stderr
    assert not (tmp_path / ".venv").exists()
