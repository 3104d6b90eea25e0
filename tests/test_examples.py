"""Every launch script in examples/ says the truth in its header, and runs: shrunk, on CPU ranks, on text made here."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_moe.config.flags import parse_run
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run, load_recipe, load_run
from megatron_moe.model.parameters import stage_memory

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
# The demo has a test of its own.
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.*") if path.name != "demo.sh")
PRETRAIN = sorted(path.name for path in EXAMPLES.glob("pretrain_*.sh"))
TIMEOUT_SECONDS = 240


def flags(text: str) -> list[str]:
    """The words of a command line."""
    return text.split()


# A model of the same kind that trains in seconds.
SMALL = flags("""
    --num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --num-experts 4 8
    --seq-length 32 --max-position-embeddings 64 --vocab-size 896 --micro-batch-size 1 --global-batch-size 4
    --train-iters 2 --lr-warmup-iters 0 --eval-interval 0 --log-interval 1 --num-workers 0 --device cpu
""")
SENTENCEPIECE = flags("--tokenizer-type SentencePieceTokenizer")
QWEN3 = flags("--num-experts 4 4 8 8 --kv-channels 8 --num-query-groups 2 --moe-ffn-hidden-size 16 --moe-router-topk 2")

LAUNCHES: dict[str, tuple[dict[str, int], list[str]]] = {
    "pretrain_pai_gpt_moe_16b.sh": (
        {"GPUS_PER_NODE": 4, "TP": 2, "PP": 2, "EP": 2},
        ["--initial-loss-scale", "1024"],
    ),
    "pretrain_pr_moe_350m.sh": ({"GPUS_PER_NODE": 2, "EP": 2}, [*SENTENCEPIECE, "--initial-loss-scale", "1024"]),
    "pretrain_pr_moe_1.3b.sh": ({"GPUS_PER_NODE": 2, "NNODES": 1, "TP": 2, "EP": 2}, [*SENTENCEPIECE, "--no-fp16"]),
    "pretrain_gpt_125m_moe64.sh": (
        {"GPUS_PER_NODE": 1, "EP": 1},
        [*SENTENCEPIECE, "--no-fp16", "--num-workers", "1"],
    ),
    "pretrain_qwen3_moe_30b_a3b.sh": (
        {"GPUS_PER_NODE": 2, "NNODES": 1, "TP": 1, "PP": 2, "EP": 1},
        [*SENTENCEPIECE, *QWEN3],
    ),
}
"""Script -> layout, and flags over `SMALL`."""


def run_script(
    name: str, variables: Mapping[str, object], arguments: Sequence[str] = (), cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run an example as a user does: variables in front, flags behind. It must succeed."""
    environment = {**os.environ, "PY": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {key: str(value) for key, value in variables.items()}
    done = subprocess.run(
        ["bash", str(EXAMPLES / name), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{name}:\n{done.stdout}\n{done.stderr}"
    return done


def check_run(folder: Path, steps: int) -> None:
    """A run's directory holds a finished run of that many steps."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lm_loss" in line] == list(range(1, steps + 1))
    assert all(0 < line["lm_loss"] < 20 for line in lines if "lm_loss" in line)
    assert (folder / "latest_checkpointed_iteration.txt").read_text().strip() == str(steps)
    assert (folder / f"iter_{steps:07d}" / "config.yaml").exists()
    assert (folder / "expert_load.jsonl").stat().st_size > 0


def data_variables(data: Path) -> dict[str, object]:
    return {"DATA_PATH": data / "train", "TOKENIZER_MODEL": data / "bpe.model"}


# --- what a script says, without running it ---


def spoken_words(name: str, tmp_path: Path, variables: Mapping[str, object] = {}) -> list[str]:
    """The command line that a script would hand to torchrun."""
    recorder = tmp_path / "python"
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    recorder.chmod(recorder.stat().st_mode | stat.S_IXUSR)
    return run_script(name, {"PY": recorder, **variables}).stdout.splitlines()


def described_run(name: str, tmp_path: Path) -> tuple[RunConfig, int]:
    """The run that a pretraining script describes by itself, and its number of processes."""
    words = spoken_words(name, tmp_path)
    module = words.index("megatron_moe.pretrain")
    run, _ = parse_run(words[module + 1 :], prog="pretrain", description="")
    launcher = dict(pairwise(words[:module]))
    return run, int(launcher["--nproc-per-node"]) * int(launcher.get("--nnodes", "1"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_and_style(name: str) -> None:
    path = EXAMPLES / name
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    header = "\n".join(line for line in lines[1:] if line.startswith("#"))
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert "Needs:" in header
    assert f"examples/{name}" in header, "the header shows the exact command"
    assert '"$@"' in text, "flags behind the script's name are passed on"
    assert max(map(len, lines)) <= 120
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    subprocess.run(["shellcheck", "--shell", "bash", *(str(EXAMPLES / name) for name in SCRIPTS)], check=True)


@pytest.mark.parametrize("name", PRETRAIN)
def test_flags_spelled_out_are_those_of_the_recipe(name: str, tmp_path: Path) -> None:
    run, _ = described_run(name, tmp_path)
    recipe = re.search(r"--recipe (\S+)", (EXAMPLES / name).read_text())
    assert recipe
    named = build_run(load_recipe(recipe[1]))
    for section in ("model", "moe", "training", "optimizer"):
        assert getattr(run, section) == getattr(named, section)


@pytest.mark.parametrize("name", PRETRAIN)
def test_memory_in_the_header_is_that_of_the_dry_run(name: str, tmp_path: Path) -> None:
    run, processes = described_run(name, tmp_path)
    text = (EXAMPLES / name).read_text()
    said = re.search(r"take ([\d.]+) GiB of each GPU", text)
    gpus = re.search(r"Needs: (\d+) GPUs of (\d+) GB", text)
    assert said
    assert gpus
    most = max(stage.total_bytes for stage in stage_memory(run, processes))
    assert said[1] == f"{most / 2**30:.1f}"
    assert int(gpus[1]) == processes
    assert most < int(gpus[2]) * 1e9
    assert f"--world-size {processes}" in text


def test_weights_and_prefixes_in_turn(tmp_path: Path) -> None:
    words = spoken_words("pretrain_pr_moe_350m.sh", tmp_path, {"DATA_PATH": "0.3 data/a 0.7 data/b"})
    start = words.index("--data-path")
    assert words[start + 1 : start + 5] == ["0.3", "data/a", "0.7", "data/b"]


@pytest.mark.parametrize(
    "name", ["generate.sh", "score.sh", "continue_pretraining.sh", "convert_to_hf.sh", "convert_verify.sh"]
)
def test_missing_variable_is_one_line(name: str) -> None:
    done = subprocess.run(["bash", str(EXAMPLES / name)], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "LOAD: set LOAD to the directory of a run" in done.stderr
    assert done.stderr.count("\n") == 1


# --- what a script does ---


def test_every_pretraining_script_is_run() -> None:
    assert sorted(LAUNCHES) == PRETRAIN


def test_dry_run_through_a_script() -> None:
    variables = {"NNODES": 1, "GPUS_PER_NODE": 1}
    done = run_script("pretrain_pai_gpt_moe_16b.sh", variables, flags("--dry-run --world-size 8"))
    assert "16,353,234,968 (16.353 B)" in done.stdout
    assert "8 processes: TP 1, PP 1, CP 1, DP 8, EP 8" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", PRETRAIN)
def test_pretrain(name: str, tiny_data: Path, tmp_path: Path) -> None:
    layout, more = LAUNCHES[name]
    save = tmp_path / "run"
    run_script(name, {**data_variables(tiny_data), **layout, "SAVE": save}, [*SMALL, *more])
    check_run(save, 2)
    run = load_run(save / "config.yaml")
    assert run.parallel.expert_model_parallel_size == layout["EP"]
    assert set(run.moe.experts_per_layer(4)) >= {4, 8}


@pytest.mark.slow
def test_quickstart(tiny_data: Path, tmp_path: Path) -> None:
    """From text on: the corpus lies there already, the tokenizer and the token files are made."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tiny_data / "train.jsonl", data / "train.jsonl")
    shutil.copy(tiny_data / "valid.jsonl", data / "heldout.jsonl")
    small = flags("""
        --num-layers 4 --hidden-size 32 --num-experts 4 8 --seq-length 64 --global-batch-size 4 --train-iters 2
        --lr-warmup-iters 0 --log-interval 1 --eval-iters 1 --device cpu
    """)
    variables = {"DATA_DIR": "data", "SAVE": "run", "VOCAB_SIZE": 860}
    done = run_script("quickstart_cpu.sh", variables, small, cwd=tmp_path)
    check_run(tmp_path / "run", 2)
    assert (data / "tokenizer" / "tokenizer.model").exists()
    assert "perplexity" in done.stdout
    assert "北京" in done.stdout


SRUN = r"""#!/usr/bin/env bash
# Stands in for srun: runs the command once a node, all nodes at once, here.
nodes=1
while [[ $1 == --* ]]; do
    case $1 in --nodes=*) nodes=${1#--nodes=} ;; esac
    shift
done
pids=()
for ((node = 0; node < nodes; node++)); do
    SLURM_NODEID=$node "$@" &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"""
SCONTROL = """#!/usr/bin/env bash
# Stands in for scontrol show hostnames LIST.
[[ $1 == show && $2 == hostnames && $3 == "here[1-2]" ]] && printf 'localhost\\nlocalhost\\n'
"""


@pytest.mark.slow
def test_slurm_on_two_nodes_that_are_one(tiny_data: Path, tmp_path: Path) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    variables = {
        **data_variables(tiny_data),
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_JOB_ID": os.getpid(),
        "SLURM_JOB_NODELIST": "here[1-2]",
        "SLURM_NNODES": 2,
        "GPUS_PER_NODE": 1,
        "EP": 2,
        "SAVE": tmp_path / "run",
    }
    run_script("slurm_pretrain.sbatch", variables, [*SMALL, "--no-fp16"])
    check_run(tmp_path / "run", 2)
    assert load_run(tmp_path / "run" / "config.yaml").parallel.expert_model_parallel_size == 2


@pytest.fixture(scope="module")
def trained(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps by two processes."""
    save = tmp_path_factory.mktemp("trained") / "run"
    variables = {**data_variables(tiny_data), "GPUS_PER_NODE": 2, "EP": 2, "SAVE": save}
    run_script("pretrain_pai_gpt_moe_16b.sh", variables, [*SMALL, "--no-fp16", "--train-tokens", "none"])
    return save


@pytest.mark.slow
def test_resume_under_another_layout(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    variables = {"LOAD": run, "GPUS_PER_NODE": 2, "PP": 2, "EP": 1}
    done = run_script("continue_pretraining.sh", variables, ["--train-iters", "3"])
    check_run(run, 3)
    assert "resumed at step 2" in done.stdout


@pytest.mark.slow
def test_new_run_from_weights(trained: Path, tiny_data: Path, tmp_path: Path) -> None:
    variables = {
        "LOAD": trained,
        "SAVE": tmp_path / "new",
        "DATA_PATH": tiny_data / "valid",
        "GPUS_PER_NODE": 1,
        "EP": 1,
    }
    run_script("continue_pretraining.sh", variables, ["--train-iters", "1"])
    check_run(tmp_path / "new", 1)
    check_run(trained, 2)


@pytest.mark.slow
def test_generate(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("北京\n今天\n", encoding="utf-8")
    variables = {"LOAD": trained, "PROMPT_FILE": tmp_path / "prompts.txt", "OUTPUT": tmp_path / "out.jsonl"}
    variables |= {"GPUS_PER_NODE": 2, "TP": 2}
    run_script("generate.sh", variables, ["--max-new-tokens", "4", "--device", "cpu"])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["北京", "今天"]


@pytest.mark.slow
def test_score(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "北京的春天。"}\n{"ids": [5, 6, 7]}\n', encoding="utf-8")
    variables = {"LOAD": trained, "INPUT": tmp_path / "in.jsonl", "OUTPUT": tmp_path / "out.jsonl"}
    run_script("score.sh", variables, ["--device", "cpu"])
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [len(row["logprobs"]) for row in rows] == [len(row["ids"]) - 1 for row in rows]
    assert rows[1]["ids"] == [5, 6, 7]


@pytest.mark.slow
def test_convert_there_and_back(trained: Path, tmp_path: Path) -> None:
    """A pyramid with residual experts goes to Hugging Face and comes back as the same run."""
    folder, back = tmp_path / "exported", tmp_path / "back"
    done = run_script("convert_to_hf.sh", {"LOAD": trained, "OUTPUT": folder}, ["--license", "apache-2.0"])
    assert "MegatronMoeForCausalLM (megatron_moe): exact" in done.stdout
    assert "0 missing, 0 unexpected, 0 mismatched keys" in done.stdout
    assert "license: apache-2.0" in (folder / "README.md").read_text(encoding="utf-8")
    # The proof follows by the script for it.
    done = run_script("convert_from_hf.sh", {"HF": folder, "SAVE": back}, ["--no-verify"])
    assert "NOT verified" in done.stdout
    assert load_run(back / "config.yaml").moe == load_run(trained / "config.yaml").moe
    done = run_script("convert_verify.sh", {"LOAD": back, "HF": folder})
    assert "hold the same numbers" in done.stdout
    generated = run_script(
        "generate.sh", {"LOAD": back, "PROMPT": "北京"}, ["--max-new-tokens", "4", "--device", "cpu"]
    )
    assert "4 new tokens" in generated.stdout
