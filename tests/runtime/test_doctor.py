"""The doctor, run as a user runs it: in a subprocess, with fake packages where no real one is at hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.runtime import doctor

ROOT = Path(__file__).resolve().parents[2]


def run_doctor(*arguments: str, path: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    places = [str(each) for each in (path, ROOT) if each]
    done = subprocess.run(
        [sys.executable, "-m", "megatron_moe.doctor", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def findings(path: Path | None = None, code: int = 0) -> dict[str, dict[str, Any]]:
    report = json.loads(run_doctor("--json", path=path, code=code).stdout)
    return {finding["name"]: finding for finding in report["findings"]}


def make_files(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_text_report_says_that_training_can_run_and_nothing_else_is_printed() -> None:
    done = run_doctor()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert done.stdout.rstrip().endswith(f"Training can run here, on {device}.")
    assert done.stderr == "", "third-party warnings reach the user"
    for part in (
        "core attention",
        "norms",
        "linear layers",
        "experts",
        "dispatcher",
        "optimizer",
        "collectives",
    ):
        assert f"  {part} " in done.stdout


def test_json_report_holds_every_check() -> None:
    report = json.loads(run_doctor("--json").stdout)
    assert report["can_train"] is True
    assert report["reasons"] == []
    by_name = {finding["name"]: finding for finding in report["findings"]}
    assert by_name["torch"]["detail"].startswith(torch.__version__)
    assert by_name["grouped_mm"]["state"] == "ok"
    assert by_name["megatron-core"]["state"] == "ok"
    assert {"Python", "GPU", "NVIDIA Apex", "Transformer Engine", "triton", "collectives"} <= set(by_name)
    assert all(backend["backend"] and backend["why"] for backend in report["backends"])


def test_pypi_apex_is_told_from_nvidias_without_importing_it(tmp_path: Path) -> None:
    """The layout of apex 0.9.10dev on PyPI, whose import fails without Pyramid."""
    files = {
        "apex/__init__.py": "from pyramid_mailer.interfaces import IMailer",
        "apex/views.py": "",
        "apex/models.py": "",
    }
    found = findings(make_files(tmp_path, files))["NVIDIA Apex"]
    assert found["state"] == "warning"
    assert "not NVIDIA's" in found["detail"]
    assert str(tmp_path / "apex") in found["detail"]
    assert found["advice"].startswith("pip uninstall apex")


def test_a_foreign_apex_that_can_be_imported_does_not_stop_training(tmp_path: Path) -> None:
    found = findings(make_files(tmp_path, {"apex/__init__.py": ""}))
    assert found["NVIDIA Apex"]["state"] == "warning"
    assert found["megatron-core"]["state"] == "ok"


@pytest.mark.parametrize(
    ("extension", "state", "detail"),
    [(False, "warning", "without its CUDA extensions"), (True, "ok", "with its CUDA extensions")],
)
def test_nvidia_apex_with_and_without_its_extensions(tmp_path: Path, extension: bool, state: str, detail: str) -> None:
    files = {
        "apex/__init__.py": "",
        "apex/normalization/__init__.py": "",
        "apex/multi_tensor_apply/__init__.py": "",
    }
    if extension:
        # Found by name only: megatron-core's own import of it must fail here, as there is no such library.
        files["amp_C.py"] = "raise ImportError('no CUDA')"
    found = findings(make_files(tmp_path, files))["NVIDIA Apex"]
    assert found["state"] == state
    assert detail in found["detail"]


def test_a_missing_torch_is_an_error_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "torch" else real(name))
    report = doctor.examine()
    assert report.reasons == ("torch: not installed",)
    assert report.backends == ()
    torch_finding = next(finding for finding in report.findings if finding.name == "torch")
    assert torch_finding.advice == "pip install 'torch>=2.10'"


def test_a_broken_torch_fails_with_the_reason_and_exit_code_1(tmp_path: Path) -> None:
    broken = make_files(tmp_path, {"torch/__init__.py": "raise OSError('libcudart.so: no such file')"})
    done = run_doctor(path=broken, code=1)
    assert "Training cannot run here. torch: cannot be imported: OSError: libcudart.so: no such file" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(("version", "state"), [("0.18.4", "error"), ("0.19.0", "ok"), ("0.20.0", "error")])
def test_megatron_core_outside_its_range_is_an_error(monkeypatch: pytest.MonkeyPatch, version: str, state: str) -> None:
    real = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: version if name == "megatron-core" else real(name)
    )
    finding = doctor.check_megatron_core()
    assert finding.state == state
    assert version in finding.detail


def test_torch_older_than_its_range_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    finding = doctor.check_torch()
    assert (finding.state, finding.detail) == ("error", "2.9.1+cpu, needs >= 2.10")


def test_a_torch_without_grouped_mm_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    finding = doctor.check_grouped_mm("cpu")
    assert finding.state == "warning"
    assert "grouped_mm" in finding.detail


def test_wrong_grouped_mm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *a, **k: real(*a, **k) * 1.01)
    finding = doctor.check_grouped_mm("cpu")
    assert (finding.state, finding.detail) == ("warning", "runs, but differs from a loop")


def test_torchs_private_question_for_the_attention_kernel_is_still_there() -> None:
    """`torch._fused_sdp_choice` is an internal of torch; the doctor relies on its name and arguments."""
    assert doctor.sdpa_kernel_name("cpu", dropout=0.0) == "flash_attention"


@pytest.mark.gpu
def test_gpu_is_found_and_used_for_every_part() -> None:
    report = doctor.examine()
    assert report.device == "cuda"
    assert not report.reasons
    states = {finding.name: finding.state for finding in report.findings}
    assert states["GPU"] == states["grouped_mm"] == "ok"
    assert {backend.part: backend.backend for backend in report.backends}["collectives"] == "nccl"
