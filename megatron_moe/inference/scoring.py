"""Scores token sequences: the log-probability of every token after the first.

The probabilities are those of the training loss: natural logarithms, normalised over the padded vocabulary
(`InferenceModel.token_losses`).

Shape legend: B = sequences of a batch, S = the longest of them less one.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from tqdm import tqdm

from megatron_moe.config.base import UserError
from megatron_moe.inference.batching import Ids, domain_rows, pad_rows, plan_batches
from megatron_moe.inference.model import InferenceModel


def score_sequences(
    model: InferenceModel,
    sequences: Sequence[Ids],
    micro_batch_size: int = 8,
    domains: Sequence[int] | None = None,
) -> list[npt.NDArray[np.float32]]:
    """Log-probabilities of sequences; a collective over all ranks, with the same arguments on each.

    Args:
        model: a loaded model.
        sequences: token ids, from 2 to the model's positions + 1 of each.
        micro_batch_size: sequences that a data-parallel replica works on at once; it changes no result.
        domains: of every sequence; a model with domains needs them.

    Returns:
        On rank 0, for every sequence, [len(ids) - 1] natural logarithms; an empty list on the other ranks.

    Raises:
        UserError: a sequence is too short or too long, or the model computes a value that is not finite.
    """
    lengths = [len(ids) for ids in sequences]
    longest = model.saved.max_positions + 1
    for number, length in enumerate(lengths, start=1):
        if not 2 <= length <= longest:
            raise UserError(f"sequence {number}: {length} tokens; must be from 2 to {longest}")
    batches = plan_batches(lengths, micro_batch_size, model.replica, model.replicas)
    mine: dict[int, npt.NDArray[np.float32]] = {}
    for batch in tqdm(batches, unit="batch", disable=None if model.is_main else True):
        ids_BS = pad_rows([sequences[index] for index in batch.indices], batch.rows, batch.longest)
        losses_BS = model.token_losses(ids_BS[:, :-1], ids_BS[:, 1:], domains_BS=domain_rows(domains, batch))
        if losses_BS is None or not model.has_output:
            continue
        logprobs_BS = -losses_BS.float().cpu().numpy()
        for row, index in enumerate(batch.indices):
            mine[index] = logprobs_BS[row, : lengths[index] - 1].copy()
    gathered = _gather(mine, model.is_main)
    for index, logprobs in sorted(gathered.items()):
        if not np.isfinite(logprobs).all():
            raise UserError(
                f"sequence {index + 1}: the model gives {logprobs[~np.isfinite(logprobs)][0]}; are its weights damaged?"
            )
    return [gathered[index] for index in range(len(gathered))]


def _gather(mine: dict[int, npt.NDArray[np.float32]], is_main: bool) -> dict[int, npt.NDArray[np.float32]]:
    """The results of all ranks on rank 0, nothing elsewhere."""
    parts: list[dict[int, npt.NDArray[np.float32]]] | None = None
    if is_main:
        parts = [{} for _ in range(dist.get_world_size())]
    dist.gather_object(mine, parts, dst=0)
    return {index: logprobs for part in parts or [] for index, logprobs in part.items()}
