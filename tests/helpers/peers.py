"""Counts what a rank sends to which other rank, below everything that this package or megatron-core does.

All collectives go through methods of `torch.distributed.ProcessGroup`; while `sent_to` is active each of them is
counted. What a collective other than an all-to-all hands over is counted for every member of its group.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

# How many arguments come before the tensors that are sent; the second line has torch's names before 2.15.
_PLACES = {
    **dict.fromkeys(("all_to_all_single", "all_gather_single", "reduce_scatter_single", "gather_single"), 1),
    **dict.fromkeys(("alltoall_base", "_allgather_base", "_reduce_scatter_base"), 1),
    **dict.fromkeys(("all_gather_single_coalesced", "reduce_scatter_single_coalesced", "allgather_coalesced"), 1),
    **dict.fromkeys(("alltoall", "allgather", "reduce_scatter", "gather", "scatter"), 1),
    **dict.fromkeys(("allreduce", "allreduce_coalesced", "reduce", "broadcast", "send"), 0),
}


@contextmanager
def sent_to() -> Iterator[Counter[int]]:
    """Bytes that this rank hands over for every other rank inside of the block, by the other's global rank."""
    found: Counter[int] = Counter()
    # As they stand in the class: what getattr returns would not be a method any more when it is put back.
    originals = {name: vars(dist.ProcessGroup)[name] for name in _PLACES if name in vars(dist.ProcessGroup)}

    def counting(name: str) -> Any:
        def method(group: dist.ProcessGroup, *args: Any, **options: Any) -> Any:
            _count(found, name, group, args)
            return originals[name].__get__(group)(*args, **options)

        return method

    for name in originals:
        setattr(dist.ProcessGroup, name, counting(name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist.ProcessGroup, name, original)
        found.pop(dist.get_rank(), None)


def _count(found: Counter[int], name: str, group: dist.ProcessGroup, args: Sequence[Any]) -> None:
    ranks = dist.get_process_group_ranks(group)
    sent = args[_PLACES[name]]
    if name in ("all_to_all_single", "alltoall_base"):
        splits = args[3] or [sent.shape[0] // len(ranks)] * len(ranks)
        row = sent[:1].numel() * sent.element_size()
        for rank, rows in zip(ranks, splits, strict=True):
            if rows:
                found[rank] += rows * row
    else:
        for rank in ranks:
            found[rank] += _bytes(sent)


def _bytes(sent: Any) -> int:
    if isinstance(sent, torch.Tensor):
        return sent.numel() * sent.element_size()
    return sum(_bytes(part) for part in sent)
