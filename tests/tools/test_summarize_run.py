"""The summary of a run: its numbers are those of the files, and a missed margin is an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_moe.data.stats import unigram_cross_entropy, unigram_entropy
from megatron_moe.data.tokenizer.load import SentencePieceTokenizer

TOOL = Path(__file__).resolve().parents[2] / "tools" / "summarize_run.py"


def summarize(run: Path, data: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    words = ["--run", run, "--train-prefix", data / "train", "--heldout-prefix", data / "valid"]
    words += ["--tokenizer-model", data / "bpe.model", *flags]
    return subprocess.run([sys.executable, TOOL, *map(str, words)], capture_output=True, text=True, timeout=60)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    steps = [
        {"step": step, "lm_loss": loss, "step_seconds": 30.0, "tokens_per_second": 10.0, "consumed_tokens": step * 100}
        for step, loss in ((2, 5.0), (4, 4.0))
    ]
    rows = [*steps, {"step": 4, "eval_lm_loss": 3.5, "eval_perplexity": 33.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loads = [{"step": step, "layer": 2, "tokens": [3, 1], "dropped": 0} for step in (2, 4)]
    (tmp_path / "expert_load.jsonl").write_text("".join(json.dumps(row) + "\n" for row in loads))
    return tmp_path


def test_summary_says_what_the_files_say(run_folder: Path, tiny_data: Path) -> None:
    done = summarize(run_folder, tiny_data)
    assert done.returncode == 0, done.stderr
    vocabulary = SentencePieceTokenizer(tiny_data / "bpe.model").vocab_size
    entropy = unigram_entropy(str(tiny_data / "valid"), vocabulary)
    learned = unigram_cross_entropy(str(tiny_data / "train"), str(tiny_data / "valid"), vocabulary)
    for expected in (
        "4, 400 tokens in about 2.0 minutes",
        "5.000 at step 2 -> 4.000",
        "3.500 nats per token, perplexity 33.1",
        f"{entropy:.3f} nats per token (unigram entropy of the held-out text; {learned:.3f} by the training",
        f"below it by      {entropy - 3.5:.3f} nats",
        "2: 75% 25% of the last step's tokens",
    ):
        assert expected in done.stdout


def test_missed_margin_fails_in_one_line(run_folder: Path, tiny_data: Path) -> None:
    done = summarize(run_folder, tiny_data, "--require-margin", "50")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --require-margin 50.0: the held-out loss 3.500 is not that far below ")
    assert len(done.stderr.splitlines()) == 1


def test_folder_without_metrics_is_named(tmp_path: Path, tiny_data: Path) -> None:
    done = summarize(tmp_path, tiny_data)
    assert done.returncode == 2
    assert done.stderr == f"error: --run {tmp_path}: holds no metrics.jsonl; give the --save folder of a run\n"
