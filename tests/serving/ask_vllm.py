"""Run by an interpreter that has vLLM and nothing of this package: continues texts greedily, in fp32 on the CPU.

    PYTHON tests/serving/ask_vllm.py FOLDER QUESTIONS.json ANSWERS.json

The questions are {"texts": [...], "tokens": N}; the answers hold, for every text, the ids that the folder's tokenizer
makes of it, the ids that follow, and the log-probability of each of all these but the first.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # GiB; the default is a share of the machine's memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The engine in this process: one process less to start and to clean up.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def main(folder: str, questions: str, answers: str) -> None:
    """See the module's text."""
    os.environ.update(SETTINGS)
    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    # By name: no checker of this package's environment has it.
    vllm = importlib.import_module("vllm")
    model = vllm.LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, seed=0)
    # 0: of the token itself alone.
    wanted = vllm.SamplingParams(
        temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True, prompt_logprobs=0, logprobs=0
    )
    outputs = model.generate(asked["texts"], wanted, use_tqdm=False)
    report = {
        "vllm": vllm.__version__,
        "model": model.apply_model(_class_name)[0],
        "answers": [_answer(output) for output in outputs],
    }
    Path(answers).write_text(json.dumps(report), encoding="utf-8")


def _class_name(model: Any) -> str:
    return type(model).__module__


def _answer(output: Any) -> dict[str, Any]:
    said = output.outputs[0]
    of_prompt = [
        row[token].logprob for row, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True) if row
    ]
    of_rest = [row[token].logprob for row, token in zip(said.logprobs, said.token_ids, strict=True)]
    return {
        "prompt": list(output.prompt_token_ids),
        "ids": list(said.token_ids),
        "logprobs": of_prompt + of_rest,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
