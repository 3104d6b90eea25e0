"""Memory: the same for ten times the input, and the limit that is promised."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.chinese_text import documents

ROOT = Path(__file__).parents[3]


def peak_megabytes(source: Path, model: Path, *more: str) -> float:
    """The sum of the peaks of all processes of a run."""
    command = [sys.executable, "tools/preprocess_data.py", "--input", str(source), "--workers", "2", *more]
    command += ["--output-prefix", str(source.with_suffix("")), "--tokenizer-model", str(model)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peaks: dict[str, int] = {}
    while process.poll() is None:
        for pid in descendants(str(process.pid)):
            peaks[pid] = max(peaks.get(pid, 0), high_water(pid))
        time.sleep(0.01)
    assert process.returncode == 0
    return sum(peaks.values()) / 1024


def descendants(pid: str) -> list[str]:
    found = [pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if parent == pid:
            found += descendants(stat.parent.name)
    return found


def high_water(pid: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path: Path, tokenizer_model: Path) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents(12_000)).encode()
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    # Two pieces, and eighteen.
    small.write_bytes(lines * 2)
    large.write_bytes(lines * 20)
    assert small.stat().st_size > 5 << 20
    first, second = (peak_megabytes(path, tokenizer_model) for path in (small, large))
    # Two workers, the parent, and a little that the allocator keeps.
    assert second < first + 40
    assert second < 400


@pytest.mark.slow
@pytest.mark.parametrize("text", ["春眠不觉晓，处处闻啼鸟。", "好。"])
def test_two_workers_stay_below_a_gigabyte_with_the_longest_documents(
    tmp_path: Path, tokenizer_model: Path, text: str
) -> None:
    """Every character spelled in six bytes, and as many sentences as can be."""
    source = tmp_path / "long.jsonl"
    document = text * ((8 << 20) // len(text.encode()))
    source.write_text((json.dumps({"text": document}) + "\n") * 2, encoding="ascii")
    assert peak_megabytes(source, tokenizer_model, "--split-sentences") < 1000
