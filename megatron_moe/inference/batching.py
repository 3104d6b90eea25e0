"""Splits sequences of different lengths into batches, the same shape on every data-parallel replica.

Experts may be spread over replicas, which then exchange tokens in every layer: all replicas must take part in the same
number of forward passes. So every rank plans all batches, and takes its own part of each.

Shape legend: B = rows of a batch, S = width of a batch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = npt.NDArray[np.integer] | Sequence[int]
"""Token ids of one sequence."""


@dataclass(frozen=True)
class Batch:
    """One replica's part of a round, in which every replica works on a batch."""

    indices: tuple[int, ...]
    """Sequences of this replica, in the order of rows; the last round may leave fewer than `rows`, or none."""
    rows: int
    """B, the same on every replica; rows beyond `indices` are padding."""
    shortest: int
    """Length of the shortest sequence of the round, all replicas together."""
    longest: int
    """Length of its longest sequence."""


def plan_batches(lengths: Sequence[int], micro_batch_size: int, replica: int, replicas: int) -> list[Batch]:
    """Every round's batch of one replica, longest sequences first, so that a batch holds similar lengths and memory
    runs out at once or never.

    Args:
        lengths: tokens of every sequence.
        micro_batch_size: most rows of a batch.
        replica, replicas: this data-parallel replica among all.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    per_round = micro_batch_size * replicas
    batches = []
    for start in range(0, len(order), per_round):
        members = order[start : start + per_round]
        rows = -(-len(members) // replicas)
        batches.append(
            Batch(
                indices=tuple(members[replica * rows : (replica + 1) * rows]),
                rows=rows,
                shortest=lengths[members[-1]],
                longest=lengths[members[0]],
            )
        )
    return batches


def domain_rows(domains: Sequence[int] | None, batch: Batch) -> Tensor | None:
    """[B, 1] the domains of a batch's sequences; None where there are none. Rows of padding are of domain 0."""
    if domains is None:
        return None
    return pad_rows([[domains[index]] for index in batch.indices], batch.rows, 1)


def pad_rows(sequences: Iterable[Ids], rows: int, width: int) -> Tensor:
    """[B, S] int64: one sequence a row, filled up with id 0 on the right, where causal attention does not see it."""
    ids_BS = torch.zeros(rows, width, dtype=torch.long)
    for row, ids in enumerate(sequences):
        ids_BS[row, : len(ids)] = torch.from_numpy(np.asarray(ids, dtype=np.int64))
    return ids_BS
