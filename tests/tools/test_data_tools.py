"""build_tokenizer and preprocess_data as a user runs them: real processes from text to token files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.data.indexed import open_indexed
from megatron_moe.data.tokenizer.load import SentencePieceTokenizer
from tests.data.chinese_text import documents, write_jsonl

ROOT = Path(__file__).parents[2]


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_text_to_token_files(tmp_path: Path) -> None:
    texts = documents(150)
    corpus = write_jsonl(tmp_path / "train.jsonl", texts)
    built = run("build_tokenizer", "--input", corpus, "--output", tmp_path / "tok", "--vocab-size", 820)
    assert built.returncode == 0, built.stderr
    assert "820 pieces from 150 documents" in built.stdout
    assert "none was skipped" in built.stdout
    arguments = [
        "--input",
        corpus,
        "--output-prefix",
        tmp_path / "train",
        "--tokenizer-model",
        tmp_path / "tok" / "tokenizer.model",
    ]
    written = run("preprocess_data", *arguments, "--workers", 2)
    assert written.returncode == 0, written.stderr
    assert "150 documents" in written.stdout
    assert "characters per token" in written.stdout
    tokenizer = SentencePieceTokenizer(tmp_path / "tok" / "tokenizer.model")
    pair = open_indexed(tmp_path / "train")
    assert tokenizer.decode(pair.document(149).tolist()) == texts[149]
    assert pair.document(149)[-1] == tokenizer.eod


def test_token_files_are_merged_inspected_measured_and_verified(tmp_path: Path, tiny_data: Path) -> None:
    texts = documents(30)
    model = ["--tokenizer-model", tiny_data / "bpe.model"]
    inputs = [
        write_jsonl(tmp_path / f"{name}.jsonl", texts[start : start + 15]) for name, start in (("a", 0), ("b", 15))
    ]
    for source in inputs:
        more = ["--output-prefix", source.with_suffix(""), "--verify", "--stats", "--seq-length", 64]
        written = run("preprocess_data", "--input", source, *model, *more)
        assert written.returncode == 0, written.stderr
        assert "verified: 15 documents are exactly what 1 input files give" in written.stdout
        assert "packing at --seq-length 64" in written.stdout
    merged = run("preprocess_data", "merge", tmp_path / "a", tmp_path / "b", "--output-prefix", tmp_path / "all")
    assert merged.stdout == f"{tmp_path / 'all'}.bin/.idx: 30 documents, 30 sequences\n", merged.stderr
    shown = run("preprocess_data", "inspect", tmp_path / "all", *model, "--document", 29)
    assert texts[29] + " <end of document>" in shown.stdout, shown.stderr
    assert "at the end of 30 of 30 documents" in shown.stdout
    verified = run("preprocess_data", "verify", tmp_path / "a", *model, "--input", inputs[1])
    assert verified.returncode == 2
    assert verified.stderr.startswith(f"error: verify {tmp_path / 'a'}: document 0 is not {inputs[1]} line 1: ")
    wrong = run("preprocess_data", "stats", tmp_path / "all", "--seq-lenght", 64)
    assert wrong.stderr == "error: unknown flag --seq-lenght; did you mean --seq-length? (see --help)\n"


@pytest.mark.parametrize("tool", ["build_tokenizer", "preprocess_data", "fetch_sample_corpus", "plot_run"])
def test_help_shows_an_example(tool: str) -> None:
    result = run(tool, "--help")
    assert result.returncode == 0, result.stderr
    assert f"python tools/{tool}.py " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--imput", "a"], "unknown flag --imput; did you mean --input?"),
        (["--input", "a"], "the following arguments are required: --output-prefix"),
        (["--input", "none.jsonl", "--output-prefix", "x"], "--input none.jsonl: no such file"),
        (["--input", str(__file__), "--output-prefix", "x"], "--tokenizer-model: needed"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], message: str) -> None:
    result = run("preprocess_data", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_debug_shows_where_it_happened() -> None:
    result = run("preprocess_data", "--input", "none.jsonl", "--output-prefix", "x", "--debug")
    assert result.returncode != 0
    assert "Traceback" in result.stderr
