"""What the READMEs and docs/ say is true: commands run, flags and files exist, numbers are those of the code.

Blocks of the READMEs: `bash` is run, in order, shrunk; `sh` (GPUs, Slurm, make) is taken apart and its flags, scripts
and targets looked up. `console` in docs/troubleshooting.md is answered by the code and compared.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from megatron_moe import evaluate, generate, score
from megatron_moe.checkpoint.hf import options as conversion
from megatron_moe.config.aliases import EXPANDED, REFUSED, RENAMED, VALUES
from megatron_moe.config.base import UserError
from megatron_moe.config.flags import LaunchOptions, ServeOptions, StartingPoint, parse_run
from megatron_moe.config.run import RunConfig
from megatron_moe.config.schema import run_sections, section_fields
from megatron_moe.config.validate import validate
from megatron_moe.config.yaml_io import build_run, load_recipe, recipe_names
from megatron_moe.model.parameters import count_parameters

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
READMES = (ENGLISH, CHINESE)
PAGES = (*READMES, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md")

# What makes a command of the README small enough for a test.
SMALLER = {
    "python tools/fetch_sample_corpus.py --output-dir data": "test -f data/train.jsonl",
    "--vocab-size 4000": "--vocab-size 860",
    "--recipe tiny-cpu": "--recipe tiny-cpu --num-layers 4 --hidden-size 32 --num-experts 4 8 --seq-length 64 "
    "--global-batch-size 4 --train-iters 2 --lr-warmup-iters 0 --eval-iters 1 --device cpu",
    "--max-new-tokens 40": "--max-new-tokens 4 --device cpu",
    "--prompt 北京 --pipeline": "--prompt 北京 --max-new-tokens 4 --device cpu --pipeline",
}
FOREIGN_FLAGS = {
    # torchrun
    *("--nproc-per-node", "--standalone", "--master-port"),
    # Slurm
    *("--nodes", "--dependency"),
    # pip
    "--no-build-isolation",
    # llama.cpp
    "--override-kv",
}
EVERY_COMMAND = {"--help", "--debug"}


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are marked with a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def flags_of(sections: Iterable[type]) -> set[str]:
    """Every spelling that a command with these sections takes."""
    fields = [spec for section in sections for spec in section_fields(section).values()]
    switches = {"--no-" + spec.flag[2:] for spec in fields if spec.scalar is bool}
    return {spec.flag for spec in fields} | switches | EVERY_COMMAND


COMMANDS = {
    "pretrain": flags_of([StartingPoint, LaunchOptions, *run_sections(RunConfig).values()]),
    "generate": flags_of([*generate.SECTIONS.values(), ServeOptions]),
    "score": flags_of([*score.SECTIONS.values(), ServeOptions]),
    "evaluate": flags_of([*evaluate.SECTIONS.values(), ServeOptions]),
    "doctor": EVERY_COMMAND,
}
SCRIPT_COMMANDS = {"generate.sh": "generate", "score.sh": "score"}


CONVERSIONS = {
    "to-hf": flags_of([conversion.ExportOptions]),
    "from-hf": flags_of([conversion.ImportOptions]),
    "verify": flags_of([conversion.VerifyOptions]),
    "inspect": flags_of([conversion.InspectOptions]),
    **dict.fromkeys(("from-pai", "from-deepspeed", "from-megatron"), flags_of([conversion.ForeignOptions])),
}


def tool_flags(name: str) -> set[str]:
    """Flags that a script in tools/ defines, itself or in the modules of data/ that it imports."""
    if name == "convert_checkpoint.py":
        return set().union(*CONVERSIONS.values())
    source = (ROOT / "tools" / name).read_text(encoding="utf-8")
    modules = [
        f"{package}.{name}" if name.islower() else package
        for package, name in re.findall(r"^from (megatron_moe\.data\S*) import (\w+)", source, re.MULTILINE)
    ]
    paths = [ROOT / f"{module.replace('.', '/')}.py" for module in (*modules, "megatron_moe.data.command_line")]
    paths += [path.parent.with_suffix(".py") for path in paths]
    sources = [source, *(path.read_text(encoding="utf-8") for path in paths if path.exists())]
    return {flag for text in sources for flag in re.findall(r'"(--[a-z][a-z-]+)"', text)} | EVERY_COMMAND


def commands(block: str) -> list[list[str]]:
    """The commands of a block as words, without the variables in front."""
    lines = block.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words and words[0] not in ("export", "echo")]


def unknown_flags(words: list[str]) -> set[str]:
    """Flags of a command that its program does not take."""
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    line = " ".join(words)
    if module := re.search(r"-m megatron_moe\.(\w+)", line):
        return given - COMMANDS[module[1]] - (FOREIGN_FLAGS if words[0] == "torchrun" else set())
    if tool := re.search(r"python tools/(\w+\.py) (\S+)", line):
        return given - (CONVERSIONS[tool[2]] if tool[1] == "convert_checkpoint.py" else tool_flags(tool[1]))
    if script := re.search(r"examples/(\S+)", line):
        assert (ROOT / "examples" / script[1]).exists(), line
        slurm = FOREIGN_FLAGS if words[0] == "sbatch" else set()
        return given - COMMANDS[SCRIPT_COMMANDS.get(script[1], "pretrain")] - slurm
    assert words[0] == "make", f"nothing here knows how to check: {line}"
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets
    assert words[1] in targets[1].split(), line
    return set()


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_commands_exist(path: Path) -> None:
    lines = [words for language in ("sh", "bash") for block in blocks(path, language) for words in commands(block)]
    assert len(lines) > 15
    for words in lines:
        assert not unknown_flags(words), shlex.join(words)


def test_both_readmes_have_the_same_commands() -> None:
    for language in ("sh", "bash"):
        assert blocks(ENGLISH, language) == blocks(CHINESE, language)


def test_both_readmes_have_the_same_links_and_flags() -> None:
    texts = [path.read_text(encoding="utf-8") for path in READMES]
    targets = [
        {target.replace(".zh-CN", "") for target in re.findall(r"\]\(([^)]+)\)", text)} - {"README.md"}
        for text in texts
    ]
    assert targets[0] == targets[1]
    flags = [set(re.findall(r"--[a-z][a-z0-9-]+", text)) for text in texts]
    assert flags[0] == flags[1]
    assert texts[0].count("\n## ") == texts[1].count("\n## ")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_flags_named_in_the_text_exist(path: Path) -> None:
    known = set().union(*COMMANDS.values(), FOREIGN_FLAGS)
    known |= {flag for tool in (ROOT / "tools").glob("*.py") for flag in tool_flags(tool.name)}
    if path.parent.name == "docs":
        sources = [file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").glob("*.py")]
        known |= {flag for source in sources for flag in re.findall(r'add_argument\(\s*"(--[a-z-]+)"', source)}
        known |= {*RENAMED, *EXPANDED, *VALUES, *REFUSED, "--tensor-model-paralel-size", "--x", "--no-x"}
    text = path.read_text(encoding="utf-8")
    named = {flag for code in re.findall(r"`([^`\n]+)`", text) for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", code)}
    assert not named - known


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\w+/)+\w+\.py)", text):
        assert (ROOT / "megatron_moe" / name).exists() or (ROOT / name).exists(), name


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_recipe_table_is_that_of_the_dry_run(path: Path) -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|", path.read_text("utf-8"), re.MULTILINE)
    said = {name: numbers for name, *numbers in rows if name in recipe_names()}
    assert sorted(said) == recipe_names()
    for name, numbers in said.items():
        extra = {"model": {"vocab_size": 4000}} if name == "tiny-cpu" else {}
        run = build_run(load_recipe(name), extra)
        counts = count_parameters(run, padded_vocab=True)
        assert numbers == [short(counts.total), short(counts.non_expert), short(counts.activated)], name


def short(count: int) -> str:
    return f"{count / 1e9:.3f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def test_made_pages_are_up_to_date() -> None:
    tool = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "make_flag_docs.py"), "--check"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(tool, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_replacement_is_on_the_page() -> None:
    """A module that holds one is named in tools/make_flag_docs.py, which makes the table."""
    source = (ROOT / "tools" / "make_flag_docs.py").read_text(encoding="utf-8")
    for path in (ROOT / "megatron_moe").rglob("*.py"):
        if re.search(r"^REPLACEMENTS? = ", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert f"{path.stem}.REPLACEMENT" in source, path


@pytest.mark.parametrize("block", blocks(ROOT / "docs" / "troubleshooting.md", "console"))
def test_errors_are_as_shown(block: str) -> None:
    command, line = block.splitlines()
    assert line.startswith("error: ")
    words = shlex.split(command.removeprefix("$ "))
    processes = int(words[words.index("--nproc-per-node") + 1]) if "--nproc-per-node" in words else 1
    with pytest.raises(UserError) as caught:
        start(words[words.index("megatron_moe.pretrain") + 1 :], processes)
    assert f"error: {caught.value}" == line


def start(flags: list[str], processes: int) -> None:
    """As far as a run comes before it needs torch."""
    run, _ = parse_run(flags, prog="pretrain", description="")
    validate(run, processes)


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_demo_output_has_its_place(path: Path) -> None:
    shown = re.search(r"<!-- demo output -->\n(.*?)<!-- end demo output -->", path.read_text("utf-8"), re.DOTALL)
    assert shown
    assert "```text" in shown[1]


def write_wudao(lines: Path, folder: Path) -> None:
    """The documents of a JSON Lines file as a part of WuDao."""
    texts = [json.loads(line)["text"] for line in lines.open(encoding="utf-8")]
    folder.mkdir()
    part = [{"id": number, "title": "", "dataType": "新闻", "content": text} for number, text in enumerate(texts)]
    (folder / "part-00000.json").write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")


@pytest.mark.slow
def test_bash_blocks_run(tiny_data: Path, tmp_path: Path) -> None:
    """All of them, in order, in one folder, as someone who follows the README would."""
    (tmp_path / "data").mkdir()
    shutil.copy(tiny_data / "train.jsonl", tmp_path / "data" / "train.jsonl")
    shutil.copy(tiny_data / "valid.jsonl", tmp_path / "data" / "heldout.jsonl")
    write_wudao(tiny_data / "train.jsonl", tmp_path / "data" / "wudao")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run ")):
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module}"$@"\n')
        (programs / name).chmod(0o755)
    script = "\n".join(["set -euo pipefail", *blocks(ENGLISH, "bash")])
    for large, small in SMALLER.items():
        assert large in script, f"{large}: no longer in the README"
        script = script.replace(large, small)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for name in ("runs/tiny/metrics.jsonl", "runs/tiny/training.png", "scores.jsonl", "runs/four/iter_0000002"):
        assert (tmp_path / name).exists(), name
    assert "16,353,234,968 (16.353 B)" in done.stdout
