"""The proof of a conversion: both models read the same texts, each in its own program, and their logits are compared.

Both compute in float32, with weights rounded to the coarser type of the two. Ours is loaded from the run's checkpoint,
theirs by `fresh_process.py`, which has never seen this package. Nothing may be missing, unexpected
or of another shape, and no logit may be off by more than `TOLERANCE`.
"""

import dataclasses
import gc
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.hf.own_code import with_own_code
from megatron_moe.checkpoint.hf.texts import proof_ids
from megatron_moe.checkpoint.layout import UNFINISHED
from megatron_moe.config.base import Resumable, UserError
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.inference.saved_model import SavedModel

TOLERANCE = 1e-4
_SCRIPT = Path(__file__).with_name("fresh_process.py")
_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")
_PROBLEMS = {
    "missing_keys": "is needed by the class but not in the folder, so it would be random",
    "unexpected_keys": "is in the folder but not read by the class",
    "mismatched_keys": "has another shape than the class needs",
}


class NotProved(Resumable):
    """The proof could not be run, so nothing is known against the folder."""


@dataclass(frozen=True)
class Proof:
    """What was measured."""

    model_class: str
    """Of transformers, as it was loaded."""
    documents: int
    tokens: int
    dtype: str
    """Of the exported weights; both compute in float32."""
    max_difference: float
    """Of any logit."""
    mean_difference: float
    largest_logit: float
    kl: float
    """Mean over tokens of the divergence of their next-token probabilities from ours, nats."""
    same_top: float
    """Share of tokens after which both find the same token most likely."""
    versions: dict[str, str]
    note: str | None = None
    """How the code in the folder differs from what was run."""

    def lines(self) -> list[str]:
        """A screen about it."""
        return [
            f"verified with {self.model_class} in a fresh process (transformers {self.versions['transformers']}, torch "
            f"{self.versions['torch']}): 0 missing, 0 unexpected, 0 mismatched keys",
            f"logits of {self.tokens} tokens in {self.documents} texts, weights in {self.dtype}, both computed in "
            f"float32: max |difference| {self.max_difference:.2e}, mean {self.mean_difference:.2e} "
            f"(largest logit {self.largest_logit:.1f}), KL {self.kl:.1e}, same top token {self.same_top:.2%}",
            *([f"note: {self.note}; it was not run, this version's code was"] if self.note else []),
        ]

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


def check_transformers() -> None:
    """What an export and a proof need must be there before hours of work are done.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UserError("transformers: is not installed; install the version that requirements.txt names")


@contextmanager
def keeping_what_is_written() -> Iterator[None]:
    """Around the proof of a folder under way: says what to do where the proof could not be run."""
    try:
        yield
    except NotProved as error:
        raise NotProved(
            f"{error}; what is written is kept: start the same again when that is mended, or with --no-verify"
        ) from error


def prove(
    saved: SavedModel,
    folder: Path,
    *,
    dtype: str,
    left_out: Callable[[str], bool] = lambda key: False,
    remote_code: bool = False,
    tolerance: float = TOLERANCE,
    debug: bool = False,
) -> Proof:
    """Compare a checkpoint of ours with a Hugging Face folder.

    Args:
        saved: ours.
        folder: of theirs.
        dtype: such as `bfloat16`; both sides' weights are rounded to it, where they are finer.
        left_out: whether what lies in the folder is known to be no weight of the class (`native.py:is_left_out`).
        remote_code: whether it is of our own class, whose code is this package's.
        tolerance: the largest difference of a logit.
        debug: show what the fresh process prints.

    Raises:
        NotProved: one of them cannot be loaded.
        UserError: a key is missing or unexpected, or the logits are off.
    """
    # On the CPU, where float32 is float32.
    training = dataclasses.replace(saved.run.training, bf16=False, fp16=False)
    parallel = ParallelConfig(device="cpu")
    saved = dataclasses.replace(saved, run=dataclasses.replace(saved.run, training=training, parallel=parallel))
    ids = proof_ids(saved.tokenizer, saved.vocab_size, saved.max_positions)
    count = saved.run.model.num_domains
    domains = [row % count for row in range(len(ids))] if count is not None else None
    with tempfile.TemporaryDirectory(prefix="megatron_moe-proof-") as scratch:
        try:
            logits = our_logits(saved, ids, domains, dtype, Path(scratch))
        except UserError as error:
            raise NotProved(str(error)) from error
        # One model in memory at a time.
        gc.collect()
        place, note = folder, None
        if remote_code:
            place = Path(scratch) / "folder"
            note = with_own_code(folder, place)
        answer = _ask(place, ids, domains, logits, dtype, remote_code, Path(scratch), debug)
    # While it is written it has another name.
    answer["unexpected_keys"] = [key for key in answer.get("unexpected_keys", ()) if not left_out(key)]
    proof = _judge(answer, str(folder).removesuffix(UNFINISHED), dtype, tolerance)
    return dataclasses.replace(proof, note=note)


def our_logits(
    saved: SavedModel,
    ids: Sequence[Sequence[int]],
    domains: Sequence[int] | None,
    dtype: str,
    scratch: Path,
) -> list[str]:
    """Write our logits [S, V] of every row to a file; returns their paths.

    All parameters are rounded, as `fresh_process.py` rounds theirs: what stays float32 in an export are buffers.
    """
    import numpy as np
    import torch

    from megatron_moe.inference.model import load_saved

    model = load_saved(saved)
    rounded = getattr(torch, dtype)
    for parameter in model.module.parameters():
        parameter.data = parameter.data.to(rounded).to(parameter.dtype)
    paths = []
    for row, tokens in enumerate(ids):
        domain = None if domains is None else torch.tensor([[domains[row]]])
        path = scratch / f"row{row}.npy"
        np.save(path, model.logits([list(tokens)], domain)[0].numpy())
        paths.append(str(path))
    return paths


def _ask(
    folder: Path,
    ids: Sequence[Sequence[int]],
    domains: Sequence[int] | None,
    logits: list[str],
    dtype: str,
    remote_code: bool,
    scratch: Path,
    debug: bool,
) -> dict[str, Any]:
    """What the fresh process answers."""
    import torch

    request, answer = scratch / "request.json", scratch / "answer.json"
    content = {
        "folder": str(folder.resolve()),
        "remote_code": remote_code,
        "ids": ids,
        # A native class that knows none gives every domain the same.
        "domains": domains if remote_code else None,
        "logits": logits,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "debug": debug,
    }
    request.write_text(json.dumps(content), encoding="utf-8")
    # transformers copies code of a folder into its cache.
    environment = {**os.environ, "HF_HOME": str(scratch / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", str(_SCRIPT), str(request), str(answer)]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=not debug, text=True, check=False)
    if done.returncode or not answer.is_file():
        last = (done.stderr or "").strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        if done.returncode < 0:
            raise NotProved(
                f"verify {folder}: the process that loads it was killed by signal {-done.returncode} (out of memory?); "
                "make room in memory"
            )
        raise NotProved(f"verify {folder}: the process that loads it failed: {last[0][:300]}; --debug shows more")
    found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    return found


def _judge(answer: dict[str, Any], folder: str, dtype: str, tolerance: float) -> Proof:
    if "error" in answer:
        raise NotProved(f"verify {folder}: transformers cannot load it: {answer['error']}")
    for name in _KEYS:
        if keys := answer[name]:
            more = f" (and {len(keys) - 1} others)" if len(keys) > 1 else ""
            raise UserError(f"verify {folder}: {keys[0]} {_PROBLEMS[name]}{more}")
    rows = answer["rows"]
    for row in rows:
        if "shapes" in row:
            ours, theirs = row["shapes"]
            raise UserError(f"verify {folder}: logits have the shape {theirs}, those of our model {ours}")
    tokens = sum(row["tokens"] for row in rows)
    means = {name: sum(row[name] * row["tokens"] for row in rows) / tokens for name in ("mean", "kl", "same_top")}
    worst = max(row["max"] for row in rows)
    proof = Proof(
        model_class=answer["class"],
        documents=len(rows),
        tokens=tokens,
        dtype=dtype,
        max_difference=worst,
        mean_difference=means["mean"],
        largest_logit=max(row["largest_logit"] for row in rows),
        kl=means["kl"],
        same_top=means["same_top"],
        versions=answer["versions"],
    )
    if not all(row["finite"] for row in rows):
        raise UserError(f"verify {folder}: some logits are not finite; the weights overflow in {dtype}, or are damaged")
    # Of a number and one that is none, max() takes whichever comes first.
    if not all(row["max"] <= tolerance for row in rows):
        raise UserError(
            f"verify {folder}: logits differ by up to {worst:.2e} (mean {means['mean']:.2e}, largest logit "
            f"{proof.largest_logit:.1f}, same top token {means['same_top']:.2%}); at most {tolerance:.0e} is allowed"
        )
    return proof
