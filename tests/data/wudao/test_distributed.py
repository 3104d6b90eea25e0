"""The same bytes come from Slurm and Ray as from local processes; what fails there is said here."""

import os
import stat
import sys
from pathlib import Path

import orjson
import psutil
import pytest

from megatron_moe.config.base import UserError
from megatron_moe.data.wudao.clean import signature_file
from megatron_moe.data.wudao.command import main
from megatron_moe.data.wudao.executors import run_local
from megatron_moe.data.wudao.job import Settings, create_job
from megatron_moe.data.wudao.stages import run_task
from tests.data.chinese_text import documents

RECIPE = "rules:\n  - whitespace\n  - length: {least: 5}\n"
# Scripts that take Slurm's place: they run what they are given at once, and write down how they were called.
SBATCH = """#!{python}
import os, re, subprocess, sys
flags, script = sys.argv[1:-1], open(sys.argv[-1]).read()
log = os.environ["FAKE_SLURM"]
number = len(open(log).readlines()) + 1 if os.path.exists(log) else 1
name = re.search("#SBATCH --job-name=(.*)", script)[1]
depends = next((flag for flag in flags if "dependency" in flag), "")
open(log, "a").write(f"{{number}} {{name}} {{depends}} {{re.search('--partition=(.*)', script)[1]}}\\n")
offset = next((flag.split("RUN_OFFSET=")[1] for flag in flags if "RUN_OFFSET" in flag), "0")
last = int(re.search("#SBATCH --array=0-([0-9]+)", script)[1])
for task in range(last + 1):
    variables = dict(os.environ, SLURM_ARRAY_TASK_ID=str(task), SLURM_JOB_ID=str(number), SLURM_NODELIST="here")
    subprocess.run(["bash", sys.argv[-1]], env=dict(variables, RUN_OFFSET=offset), stdout=sys.stderr, check=False)
print("Submitted batch job", number)
"""
SRUN = """#!/bin/bash
while [ "$1" != launch_pickled_pipeline ]; do shift; done
exec "$@"
"""
SCONTROL = "#!/bin/bash\necho $3\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = documents(400, seed=3)
    for name, some in (("a.jsonl", texts[:200]), ("b.jsonl", texts[150:])):
        (tmp_path / name).write_bytes(b"".join(orjson.dumps({"content": text}) + b"\n" for text in some))
    (tmp_path / "small.yaml").write_text(RECIPE, encoding="utf-8")
    return tmp_path


def flags(corpus: Path, output: str) -> list[str]:
    inputs = [str(corpus / "a.jsonl"), str(corpus / "b.jsonl")]
    return ["--input", *inputs, "--output", str(corpus / output), "--recipe", str(corpus / "small.yaml")]


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file() and path.name != "timings.json"}


def expected(corpus: Path) -> dict[str, bytes]:
    settings = Settings(str(corpus / "small.yaml"))
    job, _ = create_job([corpus / "a.jsonl", corpus / "b.jsonl"], corpus / "local", settings)
    run_local(job, workers=1)
    assert len(job.tasks) == 2
    return contents(corpus / "local")


@pytest.mark.slow
def test_ray_with_two_workers_writes_the_same(corpus: Path) -> None:
    ray = pytest.importorskip("ray")
    assert main([*flags(corpus, "ray"), "--executor", "ray", "--workers", "2"], "") == 0
    assert contents(corpus / "ray") == expected(corpus)
    # Ray is gone, and a task that fails is an error here.
    assert not ray.is_initialized()
    assert not [p for p in psutil.Process().children(recursive=True) if "raylet" in p.name()]
    # Go on with a job begun elsewhere, whose signatures were damaged in between.
    settings = Settings(str(corpus / "small.yaml"))
    job, _ = create_job([corpus / "a.jsonl", corpus / "b.jsonl"], corpus / "begun", settings)
    for number in range(2):
        run_task(job, "clean", number, lambda done: None)
    signature_file(job, job.tasks[1]).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"b\.sig: is not a signatures file"):
        main([*flags(corpus, "begun"), "--executor", "ray", "--workers", "2"], "")
    assert not ray.is_initialized()


@pytest.mark.slow
def test_slurm_runs_the_generated_scripts_and_writes_the_same(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datatrove")
    scripts = {"sbatch": SBATCH.format(python=sys.executable), "srun": SRUN, "scontrol": SCONTROL}
    (corpus / "bin").mkdir()
    for name, content in scripts.items():
        path = corpus / "bin" / name
        path.write_text(content, encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{corpus / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(corpus / "slurm.log"))
    command = [*flags(corpus, "slurm"), "--executor", "slurm", "--slurm-partition", "cpu", "--workers", "1"]
    assert main([*command, "--slurm-args", "account=lab"], "") == 0
    out = capfd.readouterr().out
    assert "stage clean: Slurm job 1" in out
    assert contents(corpus / "slurm") == expected(corpus)
    calls = [line.split() for line in (corpus / "slurm.log").read_text().splitlines()]
    stages = [call for call in calls if call[1].startswith("clean-") and "merge" not in call[1]]
    submitted = {call[1]: call for call in reversed(stages)}
    assert list(reversed(submitted)) == ["clean-clean", "clean-match", "clean-decide", "clean-write", "clean-report"]
    assert all(call[-1] == "cpu" for call in calls)
    assert submitted["clean-match"][2] == f"--dependency=afterok:{submitted['clean-clean'][0]}"
    launch = (corpus / "slurm" / ".work" / "logs" / "clean" / "launch_script.slurm").read_text(encoding="utf-8")
    assert "#SBATCH --account=lab\n" in launch
    # The same command afterwards says what was done.
    assert main(command, "") == 0
    assert "finished before" in capfd.readouterr().out


def test_slurm_without_sbatch_is_one_line(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datatrove")
    monkeypatch.setenv("PATH", str(corpus))
    command = [*flags(corpus, "slurm"), "--executor", "slurm"]
    with pytest.raises(UserError, match="--slurm-partition is missing"):
        main(command, "")
    with pytest.raises(UserError, match="there is no sbatch here"):
        main([*command, "--slurm-partition", "cpu"], "")
