"""What a rank of an inference test runs: the public functions, and the same numbers worked out the plain way."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.inference.options import SamplingOptions

GREEDY = SamplingOptions(greedy=True)
TEXTS = ["北京", "工程师写完了一封信。", "虽然已经很晚", "农民", "因为天气很好，上海的老师"]


def load(run_dir: Path, sizes: dict[str, int] | None = None, **options: Any) -> Any:
    from megatron_moe.inference.model import load_for_inference

    return load_for_inference(str(run_dir), ParallelConfig(device="cpu", **(sizes or {})), **options)


def prompts_of(model: Any) -> list[list[int]]:
    return [model.tokenizer.encode(text) for text in TEXTS]


def everything(run_dir: Path, data: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """Logits, continuations, scores and evaluation under a layout, as plain Python."""
    from megatron_moe.inference.evaluation import evaluate_files
    from megatron_moe.inference.evaluation_data import open_data
    from megatron_moe.inference.generation import generate
    from megatron_moe.inference.scoring import score_sequences

    model = load(run_dir, sizes)
    prompts = prompts_of(model)
    sampling = SamplingOptions(temperature=0.8, top_k=50, top_p=0.95, seed=7)
    files = open_data([str(data / "valid")], model.vocab_size)
    losses = evaluate_files(model, files, micro_batch_size=3, eval_iters=4)
    scored = [ids for ids in prompts if len(ids) > 1]
    return {
        "logits": model.logits([prompts[1], prompts[1][::-1]]).tolist(),
        "greedy": generate(model, prompts, GREEDY, max_new_tokens=10, micro_batch_size=2),
        "sampled": generate(model, prompts, sampling, max_new_tokens=10, num_samples=2, micro_batch_size=3),
        "scores": [row.tolist() for row in score_sequences(model, scored, 2)],
        "loss": losses[0].loss,
        "tokens": losses[0].tokens,
    }


def plain_logits(model: Any, ids: Sequence[int]) -> Any:
    """[S, padded vocabulary] of one text, by a forward pass of megatron-core's model and nothing else."""
    import torch

    ids_1S = torch.tensor([list(ids)])
    with torch.no_grad():
        return model._chunk(ids_1S, torch.arange(len(ids)).unsqueeze(0), None)[0]


def plain_scores(run_dir: Path, **options: Any) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """Log-probabilities by log_softmax, those of score_sequences one by one, and in batches of three."""
    from megatron_moe.inference.scoring import score_sequences

    model = load(run_dir, **options)
    sequences = [ids for ids in prompts_of(model) if len(ids) > 1]
    plain = []
    for ids in sequences:
        logprobs = plain_logits(model, ids[:-1]).log_softmax(dim=-1)
        plain.append([float(logprobs[place, label]) for place, label in enumerate(ids[1:])])
    alone, batched = score_sequences(model, sequences, 1), score_sequences(model, sequences, 3)
    return plain, [row.tolist() for row in alone], [row.tolist() for row in batched]


def plain_greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The most probable continuation, the whole text anew for every token."""
    text = list(ids)
    for _ in range(count):
        text.append(int(plain_logits(model, text)[-1, : model.vocab_size].argmax()))
    return text[len(ids) :]


def greedy_ways(run_dir: Path) -> dict[str, list[list[int]]]:
    """Greedy continuations of the same prompts: plainly, cached, not cached, one by one, all in a batch."""
    from megatron_moe.inference.generation import generate

    model = load(run_dir)
    prompts = prompts_of(model)

    def run(**options: Any) -> list[list[int]]:
        return [done.ids for done in generate(model, prompts, GREEDY, max_new_tokens=12, **options)]

    return {
        "plain": [plain_greedy(model, ids, 12) for ids in prompts],
        "alone": run(micro_batch_size=1),
        "together": run(micro_batch_size=8),
        "in twos": run(micro_batch_size=2),
        "no cache": run(micro_batch_size=8, kv_cache=False),
    }


def cache_error(run_dir: Path) -> tuple[float, float]:
    """Largest difference between logits with a cache and without over a text, and the largest logit."""
    import torch

    model = load(run_dir)
    ids = (prompts_of(model)[1] * 4)[:40]
    plain = plain_logits(model, ids)[:, : model.vocab_size]
    context = model.new_context(1, 40)
    rows = [model.next_logits(torch.tensor([ids[:7]]), context)]
    rows += [model.next_logits(torch.tensor([[index]]), context) for index in ids[7:]]
    return float((torch.cat(rows) - plain[6:]).abs().max()), float(plain.abs().max())


class EndsWith:
    """A tokenizer that takes another id for the end of a document."""

    def __init__(self, tokenizer: Any, eod: int) -> None:
        self._tokenizer, self.eod = tokenizer, eod

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def stopped(run_dir: Path) -> tuple[list[Any], list[Any]]:
    """Greedy continuations, and those when the third new token of the first prompt ends a document."""
    from megatron_moe.inference.generation import generate

    model = load(run_dir)
    prompts = prompts_of(model)
    free = generate(model, prompts, GREEDY, max_new_tokens=12)
    tokenizer = EndsWith(model.tokenizer, free[0].ids[2])
    model.saved = dataclasses.replace(model.saved, tokenizer=tokenizer)
    return free, generate(model, prompts, GREEDY, max_new_tokens=12)


def samples(run_dir: Path, sampling: SamplingOptions, **options: Any) -> list[Any]:
    from megatron_moe.inference.generation import generate

    model = load(run_dir)
    return generate(model, prompts_of(model), sampling, max_new_tokens=12, **options)


def windows_by_score(run_dir: Path, data: Path) -> tuple[float, int, float, int]:
    """Loss and tokens of a file by evaluation, and by scoring its windows."""
    from megatron_moe.inference.evaluation import evaluate_files
    from megatron_moe.inference.evaluation_data import cut_windows, open_data
    from megatron_moe.inference.scoring import score_sequences

    model = load(run_dir)
    files = open_data([str(data / "valid")], model.vocab_size)
    (result,) = evaluate_files(model, files, micro_batch_size=5)
    windows = cut_windows(files, model.saved.run.model.seq_length)
    scores = score_sequences(model, [files[0].tokens[w.start : w.start + w.length] for w in windows], 16)
    count = sum(len(row) for row in scores)
    return result.loss, result.tokens, -sum(float(row.sum(dtype="float64")) for row in scores) / count, count
