"""The files that install the project: metadata, pins, shim, Makefile targets."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import megatron_moe
from megatron_moe.checkpoint.hf.remote.family import CODE_FILES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """Canonical name -> pinned version; every line must be an exact pin."""
    found = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", line
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


def extras(project: dict[str, Any], name: str) -> list[Requirement]:
    return [Requirement(text) for text in project["optional-dependencies"][name]]


def test_requirements_are_pinned_without_apex(pins: dict[str, str]) -> None:
    assert "apex" not in pins
    assert {"torch", "megatron-core"} <= set(pins)


def test_pins_are_what_the_tests_run_with(pins: dict[str, str]) -> None:
    if os.environ.get("NO_VENV"):
        pytest.skip("NO_VENV: the interpreter is used as it is, whatever the pins say")
    differing = {
        name: (pin, importlib.metadata.version(name))
        for name, pin in pins.items()
        if importlib.metadata.version(name) != pin
    }
    assert not differing


def test_every_dependency_is_pinned_within_its_range(project: dict[str, Any], pins: dict[str, str]) -> None:
    wanted = [Requirement(text) for text in project["dependencies"]]
    wanted += extras(project, "plot") + extras(project, "test")
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("name", ["data", "te", "plot", "test", "dev"])
def test_extras_are_valid_requirements(project: dict[str, Any], name: str) -> None:
    assert extras(project, name)
    assert "apex" not in {canonicalize_name(requirement.name) for requirement in extras(project, name)}


def test_dev_extra_names_the_test_extra(project: dict[str, Any]) -> None:
    own = [requirement for requirement in extras(project, "dev") if requirement.name == project["name"]]
    assert [requirement.extras for requirement in own] == [{"test"}]


def test_python_version_file_satisfies_requires_python(project: dict[str, Any]) -> None:
    version = (ROOT / ".python-version").read_text(encoding="utf-8").strip()
    assert SpecifierSet(project["requires-python"]).contains(version)
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["python_version"] == version


def test_installed_package_is_this_tree() -> None:
    if os.environ.get("NO_VENV"):
        pytest.skip("NO_VENV: the package is found through PYTHONPATH, not installed")
    assert importlib.metadata.version("megatron_moe") == megatron_moe.__version__
    assert Path(megatron_moe.__file__).is_relative_to(ROOT)


def test_wheel_holds_recipes_type_marker_and_code_for_checkpoints(tmp_path: Path) -> None:
    """Built through setup.py, the way old tools do, from a copy: nothing is left in the tree."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "megatron_moe", source / "megatron_moe", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "README.md").write_text("A stand-in.\n")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")],
        cwd=source,
        check=True,
        capture_output=True,
    )
    built = tmp_path / "build" / "lib" / "megatron_moe"
    assert (built / "py.typed").exists()
    recipes = {path.name for path in (ROOT / "megatron_moe" / "config" / "recipes").glob("*.yaml")}
    assert {path.name for path in (built / "config" / "recipes").glob("*.yaml")} == recipes
    assert all((built / "checkpoint" / "hf" / "remote" / name).exists() for name in CODE_FILES)


def test_make_lists_its_targets() -> None:
    listing = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    listed = set(re.findall(r"^  ([a-z-]+) ", listing, flags=re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony
    assert listed == set(phony[1].split())


def test_no_registry_host_is_named() -> None:
    for name in ("Makefile", "requirements.txt", "pyproject.toml", ".ci/run", "tools/gpu_check.sh"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"index-url|find-links|pypi\.org|download\.pytorch", text), name


@pytest.mark.parametrize("name", [".ci/run", "tools/find_python.sh", "tools/gpu_check.sh"])
def test_scripts_are_executable_and_parse(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
