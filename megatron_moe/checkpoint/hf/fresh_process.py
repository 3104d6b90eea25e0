"""Loads a Hugging Face folder as anybody does, with nothing of this package, and measures how far its logits are off.

`verify.py` runs it as a file of its own, in a process that has imported nothing before:

    python -I fresh_process.py REQUEST.json ANSWER.json

The request names the folder, the ids and the logits to compare with (a .npy file for each row); the answer holds what
loading reported and the distances. Errors are the answer's `error`.
"""

import json
import os
import sys
from typing import Any

# Nothing is looked up on the network, and a wrong folder must not be taken for a name there.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")


def main(request_path: str, answer_path: str) -> None:
    """Answer a request."""
    with open(request_path, encoding="utf-8") as stream:
        request = json.load(stream)
    try:
        answer = measure(request)
    except Exception as error:  # whatever transformers raises belongs into the answer
        if request["debug"]:
            raise
        lines = str(error).strip().splitlines()
        answer = {"error": f"{type(error).__name__}: {lines[0][:300] if lines else ''}"}
    with open(answer_path, "w", encoding="utf-8") as stream:
        json.dump(answer, stream)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load the model in float32 and compare its logits row by row."""
    import numpy as np
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        request["folder"],
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=request["remote_code"],
        output_loading_info=True,
    )
    model.eval()
    rounded = getattr(torch, request["dtype"])
    for parameter in model.parameters():
        parameter.data = parameter.data.to(rounded).to(parameter.dtype)
    answer: dict[str, Any] = {
        "class": type(model).__name__,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        answer[name] = sorted(str(key) for key in loading[name])
    answer["rows"] = []
    for row, ids in enumerate(request["ids"]):
        extra = {}
        if request["domains"] is not None:
            extra["domain_ids"] = torch.tensor([[request["domains"][row]] * len(ids)])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), use_cache=False, **extra)
        theirs_SV = output.logits[0].float()
        ours_SV = torch.from_numpy(np.load(request["logits"][row]))
        answer["rows"].append(distance(ours_SV, theirs_SV))
    return answer


def distance(ours_SV: Any, theirs_SV: Any) -> dict[str, Any]:
    """How far the logits [S, V] of a row are from each other; where shapes differ, both."""
    import torch

    if ours_SV.shape != theirs_SV.shape:
        return {"shapes": [list(ours_SV.shape), list(theirs_SV.shape)]}
    difference = (ours_SV - theirs_SV).abs()
    ours, theirs = (torch.log_softmax(logits.double(), dim=-1) for logits in (ours_SV, theirs_SV))
    return {
        "tokens": len(ours_SV),
        "finite": bool(torch.isfinite(ours_SV).all() and torch.isfinite(theirs_SV).all()),
        "max": float(difference.max()),
        "mean": float(difference.mean()),
        "largest_logit": float(ours_SV.abs().max()),
        "kl": float((ours.exp() * (ours - theirs)).sum(dim=-1).mean()),
        "same_top": float((ours_SV.argmax(dim=-1) == theirs_SV.argmax(dim=-1)).float().mean()),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
