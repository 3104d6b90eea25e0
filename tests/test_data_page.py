"""docs/data.md and its Chinese twin: the commands run, in order, and both pages have the same ones."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.pages import assert_twins
from tests.test_readme import ROOT, blocks, commands, unknown_flags, write_wudao

ENGLISH, CHINESE = ROOT / "docs" / "data.md", ROOT / "docs" / "data.zh-CN.md"
# What makes the commands small enough for a test.
SMALLER = {
    "python tools/fetch_sample_corpus.py --output-dir data --sources all": "test -f data/train.jsonl",
    "--vocab-size 50000": "--vocab-size 860",
    "--vocab-size 8000": "--vocab-size 820",
}


def test_flags_of_every_command_exist() -> None:
    lines = [words for language in ("sh", "bash") for block in blocks(ENGLISH, language) for words in commands(block)]
    assert len(lines) > 10
    for words in lines:
        assert not unknown_flags(words), shlex.join(words)


def test_both_pages_have_the_same_commands_tables_and_headings() -> None:
    assert_twins(ENGLISH, CHINESE, ("sh", "bash"))


@pytest.mark.slow
def test_the_commands_run(tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tiny_data / "train.jsonl", data / "train.jsonl")
    shutil.copy(tiny_data / "valid.jsonl", data / "heldout.jsonl")
    write_wudao(tiny_data / "train.jsonl", data / "wudao")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    script = "\n".join(["set -euo pipefail", f'python() {{ {shlex.quote(sys.executable)} "$@"; }}'])
    script = "\n".join([script, *blocks(ENGLISH, "bash")])
    for large, small in SMALLER.items():
        assert large in script, f"{large}: no longer on the page"
        script = script.replace(large, small)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    for name in ("clean/report.html", "mine/report.json", "tokenizer/tokenizer.json", "clean-train.idx"):
        assert (data / name).is_file(), name
