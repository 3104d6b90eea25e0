"""What vLLM says of exported folders is what our model says: the same tokens, the same log-probabilities.

    MEGATRON_MOE_SERVING_PYTHON=/path/to/python make serving-check

names an interpreter of another environment in which `import vllm` works (docs/checkpoints.md has the commands that make
one for a CPU). Half a minute a model. Without the variable the tests skip.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.converting import converted
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import train_curve
from tests.inference.test_commands import call, flags, read_rows, write_rows

pytestmark = [pytest.mark.serving, pytest.mark.slow]

INTERPRETER = "MEGATRON_MOE_SERVING_PYTHON"
TEXTS = ["北京的老师", "今天天气很好，", "学生们 read 3 books"]
NEW_TOKENS = 12
# fp32 on both sides; measured: 7e-6 (mixtral), 3e-6 (qwen2_moe).
TOLERANCE = 1e-4

COMMON: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "max_position_embeddings": 256,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    # Heads of 32: vLLM's attention on a CPU takes no narrower ones.
    "hidden_size": 128,
    "num_query_groups": 2,
    "num_layers": 2,
    "num_experts": (4,),
    "expert_interval": 1,
    "moe_ffn_hidden_size": 64,
    # 860 rows: `score` gives rows that only pad the embedding a share of the probability, and an export has none.
    "make_vocab_size_divisible_by": 4,
    "init_method_std": 0.15,
    "train_iters": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"mlp_type": "standard", "moe_router_topk": 2},
    # No biases, and a shared path without a gate: vLLM's class has both always (see families/qwen2_moe.py).
    "qwen2_moe": {"mlp_type": "residual", "residual_combine": "add", "moe_router_topk": 1},
}


@pytest.fixture(scope="module")
def interpreter() -> str:
    """A Python that has vLLM."""
    path = os.environ.get(INTERPRETER)
    if not path:
        pytest.skip(f"{INTERPRETER} is not set: name a python that has vLLM (docs/checkpoints.md)")
    return path


def ask(interpreter: str, folder: Path, scratch: Path) -> dict[str, Any]:
    """What vLLM answers, in a process of its own."""
    questions, answers = scratch / "questions.json", scratch / "answers.json"
    questions.write_text(json.dumps({"texts": TEXTS, "tokens": NEW_TOKENS}), encoding="utf-8")
    script = Path(__file__).with_name("ask_vllm.py")
    # Nothing of this environment may be imported there.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [interpreter, str(script), str(folder), str(questions), str(answers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found: dict[str, Any] = json.loads(answers.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("family", MODELS)
def test_vllm_answers_as_we_do(family: str, interpreter: str, tiny_data: Path, tmp_path: Path) -> None:
    save, folder = tmp_path / "run", tmp_path / "exported"
    run_ranks(1, train_curve, tiny_run(**{**COMMON, **MODELS[family]}, **data_flags(tiny_data), save=str(save)))
    printed = converted("to-hf", "--load", save, "--output", folder, "--workers", 1)
    assert f"({family}): exact" in printed

    theirs = ask(interpreter, folder, tmp_path)
    # vLLM's own class, not its wrapper around that of transformers.
    assert theirs["model"] == f"vllm.model_executor.models.{family}"

    prompts = write_rows(tmp_path / "prompts.jsonl", *({"text": text} for text in TEXTS))
    words = flags(load=save, prompt_file=prompts, output=tmp_path / "generated.jsonl", max_new_tokens=NEW_TOKENS)
    run_ranks(1, call, "generate", *words, "--greedy")
    ours = read_rows(tmp_path / "generated.jsonl")
    # A run of two steps does not end a document.
    assert [len(row["ids"]) for row in ours] == [NEW_TOKENS] * len(TEXTS)
    assert [answer["ids"] for answer in theirs["answers"]] == [row["ids"] for row in ours]

    whole = [answer["prompt"] + answer["ids"] for answer in theirs["answers"]]
    sources = write_rows(
        tmp_path / "texts.jsonl", *({"ids": ids} for ids in whole), *({"text": text} for text in TEXTS)
    )
    run_ranks(1, call, "score", *flags(load=save, input=sources, output=tmp_path / "scored.jsonl"))
    scored = read_rows(tmp_path / "scored.jsonl")
    assert [answer["prompt"] for answer in theirs["answers"]] == [row["ids"] for row in scored[len(TEXTS) :]]
    for answer, row in zip(theirs["answers"], scored, strict=False):
        assert answer["logprobs"] == pytest.approx(row["logprobs"], abs=TOLERANCE)
    found = [
        pair
        for answer, row in zip(theirs["answers"], scored, strict=False)
        for pair in zip(answer["logprobs"], row["logprobs"], strict=True)
    ]
    print(f"vLLM {theirs['vllm']}, {family}: max |difference| {max(abs(a - b) for a, b in found):.2e}")
