"""The commands as a user types them: files in and out, and one clear line for every mistake."""

import contextlib
import gzip
import importlib
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_moe.checkpoint.layout import find_checkpoint
from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer.load import load_saved_tokenizer
from megatron_moe.inference.output import check_output
from megatron_moe.inference.score_file import read_sequences
from tests.helpers.distributed import run_ranks


def call(command: str, *words: str) -> str:
    """Run an entry point's main on this rank; what it prints."""
    main = importlib.import_module(f"megatron_moe.{command}").main
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        main(list(words))
    return screen.getvalue()


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def flags(**values: object) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def failure(command: str, *words: str) -> str:
    """The one line that a command which must fail prints, after checking that it is one and the exit code is 2."""
    result = subprocess.run(
        [sys.executable, "-m", f"megatron_moe.{command}", *words], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_generate_from_file_to_file(checkpoint: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "in.jsonl", {"text": "北京", "id": 1}, {"text": ""}, {"text": "老师\n和学生"})
    output = tmp_path / "new" / "out.jsonl"
    options = flags(load=checkpoint, prompt_file=prompts, output=output, max_new_tokens=5, num_samples=2)
    (screen,) = run_ranks(1, call, "generate", *options)
    rows = read_rows(output)
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (prompt, sample) for prompt in ("北京", "", "老师\n和学生") for sample in (0, 1)
    ]
    for row in rows:
        assert set(row) == {"prompt", "sample", "text", "ids", "finish_reason"}
        assert row["finish_reason"] == "stop" or len(row["ids"]) == 5
    assert f"wrote 6 continuations by {checkpoint / 'iter_0000002'} to {output}" in screen
    assert list(output.parent.iterdir()) == [output], "no temporary file is left"


def test_generate_on_the_screen_from_two_ranks(checkpoint: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("北京\n今天\n", encoding="utf-8")
    shared = [*flags(load=checkpoint, max_new_tokens=4), "--greedy"]
    (one,) = run_ranks(1, call, "generate", *shared, "--prompt", "北京", "今天", "--no-kv-cache")
    two = run_ranks(
        2, call, "generate", *shared, *flags(prompt_file=prompts, tensor_model_parallel_size=2, device="cpu")
    )
    assert two == [one, ""], "only rank 0 speaks"
    assert one.count("--- 4 new tokens, length") == 2
    assert "\n北京" in one


def test_score_keeps_the_order_and_takes_text_or_ids(checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"text": "北京的老师"}, {"ids": [5, 800, 7]}, {"text": "因为天气很好，上海的学生", "other": 1}]
    source = tmp_path / "in.jsonl.gz"
    source.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    (screen,) = run_ranks(1, call, "score", *flags(load=checkpoint, input=source, output=one))
    sizes = flags(pipeline_model_parallel_size=2, micro_batch_size=1, iteration=2)
    run_ranks(2, call, "score", *flags(load=checkpoint, input=source, output=two), *sizes)
    scored = read_rows(one)
    assert scored[1]["ids"] == [5, 800, 7]
    for row, other in zip(scored, read_rows(two), strict=True):
        assert list(row) == ["ids", "logprobs", "sum", "mean", "perplexity"]
        assert len(row["logprobs"]) == len(row["ids"]) - 1
        assert row["sum"] == pytest.approx(math.fsum(row["logprobs"]))
        assert row["mean"] == pytest.approx(row["sum"] / len(row["logprobs"]))
        assert row["perplexity"] == pytest.approx(math.exp(-row["mean"]))
        assert row["ids"] == other["ids"]
        assert row["logprobs"] == pytest.approx(other["logprobs"], abs=1e-4)
    assert "scored 3 sequences" in screen


def test_evaluate_writes_what_it_prints(checkpoint: Path, tiny_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "evaluation.json"
    prefixes = [str(tiny_data / name) for name in ("valid", "train")]
    words = [*flags(load=checkpoint, output=output, micro_batch_size=64), "--data-path", *prefixes]
    (screen,) = run_ranks(1, call, "evaluate", *words)
    report = json.loads(output.read_text(encoding="utf-8"))
    assert [part["prefix"] for part in report["data"]] == prefixes
    assert report["tokens"] == sum(part["tokens"] for part in report["data"])
    weighted = sum(part["loss"] * part["tokens"] for part in report["data"])
    assert report["loss"] == pytest.approx(weighted / report["tokens"])
    assert report["perplexity"] == pytest.approx(math.exp(report["loss"]))
    assert f"all: {report['tokens']} tokens, loss {report['loss']:.4f}" in screen
    assert screen.count("\n") == 3


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "not JSON"),
        ("", "empty line"),
        ("[1, 2]", "expected a JSON object with the field 'text' or 'ids', got list"),
        ({"tokens": [1, 2]}, "has neither 'text' nor 'ids'"),
        ({"text": "a", "ids": [1, 2]}, "holds both"),
        ({"text": 5}, "field 'text' must be a string, got int"),
        ({"ids": [1, 2.5]}, "field 'ids' must be a list of integers"),
        ({"ids": [1, True]}, "field 'ids' must be a list of integers"),
        ({"ids": [1, 860]}, "token id 860; must be from 0 to 859"),
        ({"ids": [-1, 5]}, "token id -1"),
        ({"ids": [1]}, "1 token; scoring needs at least 2"),
        ({"text": ""}, "no tokens"),
        ({"ids": [1] * 50}, "50 tokens; the model reads at most 48 positions, so it can score at most 49"),
    ],
)
def test_a_line_that_cannot_be_scored(line: object, problem: str, checkpoint: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", {"ids": [1] * 49}, line, {"ids": [1, 2]})
    tokenizer = load_saved_tokenizer(find_checkpoint(checkpoint) / "tokenizer")
    with pytest.raises(UserError) as caught:
        read_sequences(source, tokenizer, 860, 48)
    assert str(caught.value).startswith(f"{source} line 2: {problem}")


def test_nothing_is_written_when_a_line_is_bad(checkpoint: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", {"ids": [1, 2]}, {"ids": [1, 9999]})
    output = tmp_path / "out.jsonl"
    output.write_text("earlier\n", encoding="utf-8")
    line = failure("score", *flags(load=checkpoint, input=source, output=output))
    assert line == f"error: {source} line 2: token id 9999; must be from 0 to 859"
    assert output.read_text(encoding="utf-8") == "earlier\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("generate", ["--prompt", "a"], "--load: is required"),
        ("generate", ["--load", "{run}"], "--prompt or --prompt-file: give one of them"),
        ("generate", ["--load", "{run}", "--promt", "a"], "--promt: unknown flag; did you mean --prompt?"),
        ("generate", ["--load", "{run}", "--prompt", "a", "--max-new-tokens", "48"], "--max-new-tokens 48: with the"),
        ("generate", ["--load", "{tmp}/none", "--prompt", "a"], "--load {tmp}/none: no such folder"),
        ("generate", ["--load", "{tmp}", "--prompt", "a"], "--load {tmp}: holds no checkpoint"),
        ("generate", ["--load", "{run}", "--prompt-file", "{tmp}/no.txt"], "--prompt-file {tmp}/no.txt: no such file"),
        ("generate", ["--load", "{run}", "--prompt", "a", "--iteration", "9"], "--iteration 9: {run} holds no such"),
        (
            "generate",
            ["--load", "{run}", "--prompt", "a", "--pipeline-model-parallel-size", "2"],
            "--tensor-model-parallel-size 1 x --pipeline-model-parallel-size 2",
        ),
        (
            "score",
            ["--load", "{run}", "--input", "{tmp}/x", "--output", "{tmp}/y", "--use-distributed-optimizer"],
            "--use-distributed-optimizer: is for training only",
        ),
        ("score", ["--load", "{run}", "--input", "{tmp}/x", "--output", "{tmp}/y"], "--input {tmp}/x: no such file"),
        ("evaluate", ["--load", "{run}", "--data-path", "{tmp}/x"], "--data-path {tmp}/x: no file {tmp}/x.idx"),
        ("evaluate", ["--load", "{run}", "--data-path", "0.5", "{tmp}/x"], "--data-path 0.5: every token is read once"),
    ],
)
def test_a_mistake_is_one_line(command: str, words: list[str], message: str, checkpoint: Path, tmp_path: Path) -> None:
    places = {"run": checkpoint, "tmp": tmp_path}
    # None of them gets as far as starting process groups, so they need no process of their own.
    with pytest.raises(UserError) as caught:
        call(command, *(word.format(**places) for word in words))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(message.format(**places))


def test_output_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", {"ids": [1, 2]})
    with pytest.raises(UserError, match="is a folder"):
        check_output(str(tmp_path))
    with pytest.raises(UserError, match="is the input itself"):
        check_output(str(source), str(source))
    with pytest.raises(UserError, match="cannot make its folder"):
        check_output(str(source / "out.jsonl"))
