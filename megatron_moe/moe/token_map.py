"""Fixed maps from token ids to experts, for routers that learn nothing.

A map depends on the seed, the layer and the group of experts alone, never on ranks: every layout draws the same one.

Shape legend: V = token ids, K = experts of a token.
"""

import heapq

import numpy as np
import torch
from torch import Tensor

from megatron_moe.config.base import UserError
from megatron_moe.moe.token_random import uniform

_PURPOSE_UNIFORM = 0x6D61702D31
_PURPOSE_ORDER = 0x6D61702D32
_PURPOSE_TIE = 0x6D61702D33


def read_counts(file: str, vocab_size: int, domains: int | None) -> Tensor:
    """What `tools/preprocess_data.py counts` wrote: how often each token id occurs, padded with zeros.

    Args:
        file: .npy of integers, [ids], or [domains, ids] where the text has domains.
        vocab_size: V, the padded vocabulary.
        domains: of the model; None: it knows none, so counts by domain are added up.

    Returns:
        [V], or [domains, V], int64.

    Raises:
        UserError: the file is missing, is no such file, or of another vocabulary or other domains.
    """
    flag, cure = f"--router-token-counts {file}", "write it with tools/preprocess_data.py counts"
    try:
        counts = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{flag}: no such file; {cure}") from error
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{flag}: no array of numbers ({str(error).splitlines()[0]}); {cure}") from error
    except MemoryError as error:
        # numpy makes room for what a header announces before it looks for it.
        raise UserError(f"{flag}: announces more numbers than there is memory; {cure}") from error
    if not isinstance(counts, np.ndarray) or not np.issubdtype(counts.dtype, np.integer) or counts.ndim not in (1, 2):
        raise UserError(f"{flag}: must hold one integer for each token id, or for each domain and token id; {cure}")
    if bool((counts < 0).any()) or bool((counts > np.iinfo(np.int64).max // max(1, counts.size)).any()):
        raise UserError(f"{flag}: holds numbers that are no counts; {cure}")
    if not counts.any():
        raise UserError(f"{flag}: says that no token id occurs; {cure}, from the text that is trained on")
    if not 0 < counts.shape[-1] <= vocab_size:
        raise UserError(
            f"{flag}: holds counts of {counts.shape[-1]} token ids, the vocabulary has {vocab_size}; {cure} and the "
            "run's tokenizer"
        )
    if domains is None and counts.ndim == 2:
        counts = counts.sum(axis=0)
    if domains is not None and counts.ndim == 2 and counts.shape[0] > domains:
        raise UserError(f"{flag}: holds {counts.shape[0]} domains; --num-domains is {domains}")
    shape = (domains, vocab_size)[-counts.ndim :]
    missing = [(0, (wanted or 0) - held) for wanted, held in zip(shape, counts.shape, strict=True)]
    return torch.from_numpy(np.pad(counts.astype(np.int64), missing))


def draw_uniform(vocab_size: int, experts: int, *keys: int, topk: int = 1) -> Tensor:
    """[V, K] int32: for every token id K different experts of 0..experts-1, each as likely as any other.

    Args:
        vocab_size: V.
        experts: how many there are.
        keys: seed, layer and whatever else tells this map from others.
        topk: K.
    """
    token_V = torch.arange(vocab_size)
    chosen: list[Tensor] = []
    for place in range(topk):
        # One of the experts that are left, counted in their order; then its own number.
        expert_V = (uniform(*keys, _PURPOSE_UNIFORM, place, token_V) * (experts - place)).long()
        for taken_V in torch.stack(chosen).sort(dim=0).values if chosen else ():
            expert_V += expert_V >= taken_V
        chosen.append(expert_V)
    return torch.stack(chosen, dim=1).int()


def draw_balanced(counts_V: Tensor, experts: int, *keys: int, topk: int = 1) -> Tensor:
    """[V, K] int32: K different experts for every token id, so that experts get equal shares of a text.

    Token ids go one after the other to the experts that have least so far. So any two experts differ by the count of
    the most frequent token id at most, which cannot be divided: a larger share of the text than 1 / experts stays an
    imbalance under every fixed map.

    The order is that of the counts, largest first, each times a random number in [1, 2): in exact order every layer
    would put the same token ids together. Token ids that do not occur are drawn uniformly.

    Args:
        counts_V: how often each token id occurs.
        experts: how many there are.
        keys: seed, layer and whatever else tells this map from others.
        topk: K.
    """
    vocab_size = counts_V.numel()
    map_VK = draw_uniform(vocab_size, experts, *keys, topk=topk)
    token_V = torch.arange(vocab_size)
    rank_V = counts_V.double() * (1.0 + uniform(*keys, _PURPOSE_ORDER, token_V))
    order = torch.argsort(rank_V, descending=True, stable=True)
    order = order[counts_V[order] > 0]
    ties_E = uniform(*keys, _PURPOSE_TIE, torch.arange(experts)).tolist()
    heap = [(0, ties_E[expert], expert) for expert in range(experts)]
    heapq.heapify(heap)
    assigned = []
    for count in counts_V[order].tolist():
        least = [heapq.heappop(heap) for _ in range(topk)]
        assigned.append([expert for _, _, expert in least])
        for load, tie, expert in least:
            heapq.heappush(heap, (load + count, tie, expert))
    if assigned:
        map_VK[order] = torch.tensor(assigned, dtype=torch.int32)
    return map_VK
