"""The command line of convert_checkpoint: help, commands, flags; what the commands do stands in tests/checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.checkpoint.hf.command_line import COMMANDS, main
from megatron_moe.checkpoint.hf.options import ExportOptions, byte_count
from megatron_moe.config.base import ConfigError

ROOT = Path(__file__).parents[2]


def test_help_without_torch() -> None:
    """In a process of its own: it answers at once, as nothing heavy is imported."""
    code = (
        "import atexit, runpy, sys; sys.argv = ['convert_checkpoint.py']\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        "runpy.run_path('tools/convert_checkpoint.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(f"convert_checkpoint.py {command}" in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"], "")
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"python tools/convert_checkpoint.py {command} --" in text or "convert_checkpoint.py inspect " in text
    assert "--debug" in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tohf"], "tohf: unknown command; did you mean to-hf?"),
        (["xyz"], "xyz: unknown command; there are to-hf, from-hf, verify, "),
        (["to-hf", "--load", "a"], "--output: is required: "),
        (
            ["to-hf", "--load", "a", "--output", "b", "--dtype", "fp8"],
            "--dtype fp8: must be one of auto, fp32, bf16, fp16",
        ),
        (["to-hf", "--load", "a", "--output", "b", "--allow-lossy"], "--allow-lossy: needs --target"),
        (["to-hf", "--load", "a", "--output", "b", "--license-file", "c"], "--license-file: needs --license"),
        (["to-hf", "--load", "a", "--output", "b", "--workers", "0"], "--workers 0: must be at least 1"),
        (["from-hf", "--hf", "a", "--save", "b", "--make-vocab-size-divisible-by", "0"], "must be at least 1"),
        (["verify", "--load", "a"], "--hf: is required: "),
        (["inspect"], "--path: is required: "),
    ],
)
def test_wrong_flags(words: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        main(words, "")
    assert line in str(error.value)


def test_inspect_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a.layers.0.w": torch.zeros(2, 3), "a.layers.1.w": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    main(["inspect", str(tmp_path), "--json"], "")
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["tensors"]] == ["a.layers.0.w", "a.layers.1.w"]
    main(["inspect", str(tmp_path)], "")
    assert "a.layers.*.w" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "count"), [("5GB", 5 * 10**9), ("500MiB", 500 << 20), ("1.5 kb", 1500), ("7B", 7), ("2tib", 2 << 40)]
)
def test_sizes(text: str, count: int) -> None:
    assert byte_count(text) == count
    assert ExportOptions(load="a", output="b", max_shard_size=text).shard_bytes == count


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0MB", "5XB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="must be a size like 5GB or 500MiB"):
        byte_count(text)
