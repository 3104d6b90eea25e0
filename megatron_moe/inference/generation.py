"""Continues prompts token by token.

Prompts of different lengths share a batch like this: the beginning that is as long as the shortest prompt goes through
the model at once, then all rows advance together, one token at a time; a row whose prompt is not over yet takes its own
next token instead of the chosen one. Rows are never padded in between, so every row sees exactly the positions and
tokens that it would see alone.

Shape legend: B = rows, T = longest prompt + new tokens, V = vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from tqdm import tqdm

from megatron_moe.inference.batching import Batch, domain_rows, pad_rows, plan_batches
from megatron_moe.inference.model import InferenceModel
from megatron_moe.inference.options import SamplingOptions
from megatron_moe.inference.prompts import check_lengths
from megatron_moe.inference.sampling import choose_tokens, draw, row_generator


@dataclass(frozen=True)
class Completion:
    """One continuation of a prompt."""

    prompt: int
    """Number of the prompt in the input, from 0."""
    sample: int
    """Number of the continuation of that prompt, from 0."""
    ids: list[int]
    """The new tokens; the last one ends the document if `finish_reason` is `stop`."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the model ended the document. `length`: there were as many tokens as allowed."""


@dataclass(frozen=True)
class _Request:
    prompt: int
    sample: int
    ids: list[int]


def generate(
    model: InferenceModel,
    prompts: Sequence[list[int]],
    sampling: SamplingOptions,
    *,
    max_new_tokens: int = 64,
    num_samples: int = 1,
    micro_batch_size: int = 8,
    kv_cache: bool = True,
    domains: Sequence[int] | None = None,
) -> list[Completion]:
    """Continue prompts; a collective over all ranks, with the same arguments on each.

    Args:
        model: a loaded model.
        prompts: token ids, at least one of each.
        sampling: how the next token is chosen.
        max_new_tokens: most tokens of a continuation.
        num_samples: continuations of each prompt.
        micro_batch_size: sequences that a data-parallel replica works on at once.
        kv_cache: keep keys and values of earlier tokens; the result is the same without.
        domains: of every prompt; a model with domains needs them.

    Returns:
        Continuations on every rank, those of the first prompt first.

    Raises:
        ConfigError: a prompt leaves too few positions for `max_new_tokens`.
    """
    check_lengths(prompts, max_new_tokens, model.saved.max_positions)
    requests = [_Request(number, sample, ids) for number, ids in enumerate(prompts) for sample in range(num_samples)]
    lengths = [len(request.ids) for request in requests]
    batches = plan_batches(lengths, micro_batch_size, model.replica, model.replicas)
    of_requests = None if domains is None else [domains[request.prompt] for request in requests]
    done: list[Completion] = []
    for batch in tqdm(batches, unit="batch", disable=None if model.is_main and len(batches) > 1 else True):
        texts = _Texts(model, [requests[index] for index in batch.indices], batch, sampling, max_new_tokens)
        _run(model, texts, kv_cache, domain_rows(of_requests, batch))
        done += texts.completions()
    gathered: list[list[Completion]] = [[] for _ in range(model.replicas)]
    dist.all_gather_object(gathered, done, group=parallel_state.get_data_parallel_group())
    return sorted((item for part in gathered for item in part), key=lambda item: (item.prompt, item.sample))


def _run(model: InferenceModel, texts: "_Texts", kv_cache: bool, domains_B1: Tensor | None) -> None:
    """Advance one batch until every row of every replica is finished."""
    rows, width = texts.ids_BT.shape
    context = model.new_context(rows, width) if kv_cache else None
    begin, end = 0, texts.shortest
    while True:
        logits_BV = model.next_logits(texts.ids_BT[:, begin:end], context, domains_B1)
        chosen = texts.choose(logits_BV, end) if model.has_output and logits_BV is not None else None
        texts.append(model.share(chosen, (rows,), torch.long), end)
        if _all_replicas(bool(texts.finished_B.all()), model):
            return
        begin, end = end if kv_cache else 0, end + 1


def _all_replicas(finished: bool, model: InferenceModel) -> bool:
    """Whether every replica is finished; one that is goes on computing, because others may need its experts."""
    if model.replicas == 1:
        return finished
    flag = torch.tensor([int(finished)], device=model.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=parallel_state.get_data_parallel_group())
    return bool(flag.item())


class _Texts:
    """The texts of one batch while they grow; the same on every rank of a replica."""

    def __init__(
        self,
        model: InferenceModel,
        requests: list[_Request],
        batch: Batch,
        sampling: SamplingOptions,
        max_new_tokens: int,
    ) -> None:
        self._requests = requests
        self._sampling = sampling
        self._max_new_tokens = max_new_tokens
        # A text cannot hold an id that the tokenizer does not know, whatever the embedding has room for.
        self._known_ids = model.tokenizer.vocab_size
        self._eod = model.tokenizer.eod
        self.shortest = batch.shortest
        width = batch.longest + max_new_tokens
        self.ids_BT = pad_rows([request.ids for request in requests], batch.rows, width).to(model.device)
        lengths = [len(request.ids) for request in requests]
        padding = [batch.shortest] * (batch.rows - len(requests))
        self._lengths_B = torch.tensor(lengths + padding, device=model.device)
        self.finished_B = torch.tensor(
            [False] * len(requests) + [True] * len(padding), dtype=torch.bool, device=model.device
        )
        self._generators = [row_generator(sampling.seed, request.prompt, request.sample) for request in requests]

    def choose(self, logits_BV: Tensor, end: int) -> Tensor:
        """[B] the token that each row would put at position `end`."""
        logits_BV = logits_BV[:, : self._known_ids]
        if self._sampling.is_greedy:
            return choose_tokens(logits_BV, self._sampling)
        # Only rows that use the number draw one, so that it does not matter how long their batch mates are.
        drawing = self._generating(end).tolist()
        uniforms = [0.0] * len(drawing)
        for row, generator in enumerate(self._generators):
            if drawing[row]:
                uniforms[row] = draw(generator)
        uniforms_B = torch.tensor(uniforms, dtype=torch.float64, device=logits_BV.device)
        return choose_tokens(logits_BV, self._sampling, uniforms_B)

    def append(self, chosen_B: Tensor, end: int) -> None:
        """Put the chosen tokens [B] at position `end` of the rows whose prompt is over."""
        generating_B = self._generating(end)
        self.ids_BT[:, end] = torch.where(generating_B, chosen_B, self.ids_BT[:, end])
        full_B = end + 1 >= self._lengths_B + self._max_new_tokens
        self.finished_B |= generating_B & ((chosen_B == self._eod) | full_B)

    def completions(self) -> list[Completion]:
        """What was generated, row by row."""
        results = []
        # Rows beyond the requests only make the batches of all replicas equally large.
        rows = self.ids_BT[: len(self._requests)].tolist()
        for request, row in zip(self._requests, rows, strict=True):
            ids = row[len(request.ids) : len(request.ids) + self._max_new_tokens]
            stopped = self._eod in ids
            ids = ids[: ids.index(self._eod) + 1] if stopped else ids
            results.append(Completion(request.prompt, request.sample, ids, "stop" if stopped else "length"))
        return results

    def _generating(self, end: int) -> Tensor:
        return (self._lengths_B <= end) & ~self.finished_B
