"""Compares checksums of stored tensors, also of those that no rank has read as a whole."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_moe.checkpoint.stored_tensor import Reading, StoredTensor, check_remainder, check_whole
from megatron_moe.config.base import UserError

type Place = tuple[str, int]
"""A file, and where in it a tensor begins."""
type Boxes = dict[tuple[tuple[int, ...], tuple[int, ...]], int]
"""What was read of a tensor: begin and size of each box, and its remainder (`stored_tensor.Reading`)."""


@dataclass
class PartsRead:
    """What this process has read of each stored tensor, for their checksums."""

    nbytes: int = 0
    """Bytes of tensors that were read."""
    parts: dict[Place, tuple[StoredTensor, Boxes]] = field(default_factory=dict)

    def add(
        self, path: Path, stored: StoredTensor, start: tuple[int, ...], size: tuple[int, ...], reading: Reading
    ) -> None:
        """Take note of a box that was read.

        Raises:
            UserError: it is the whole tensor, and damaged.
        """
        self.nbytes += reading.nbytes
        if reading.nbytes == stored.nbytes:
            check_remainder(stored, reading.remainder)
        elif reading.nbytes:
            boxes = self.parts.setdefault((str(path), stored.begin), (stored, {}))[1]
            boxes[start, size] = reading.remainder

    def check_alone(self) -> None:
        """Compare the checksums of all that was read in part; what is missing for them is read for them alone.

        Raises:
            UserError: a part is damaged.
        """
        for place, (stored, boxes) in self.parts.items():
            _check(place, stored, boxes)

    def check_together(self) -> None:
        """The same, where other ranks have read the rest; all call it.

        Raises:
            UserError: a part is damaged; on one of the ranks that have read of it.
        """
        mine: dict[Place, Boxes] = {place: boxes for place, (_, boxes) in self.parts.items()}
        everyones: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
        first: dict[Place, int] = {}
        for rank, theirs in enumerate(everyones):
            for place in theirs:
                first.setdefault(place, rank)
        for place, (stored, boxes) in self.parts.items():
            if first[place] != dist.get_rank():
                continue
            for theirs in everyones:
                for box, value in theirs.get(place, {}).items():
                    if boxes.setdefault(box, value) != value:
                        # Of several, the last to be counted would hide the others: nodes may have copies of the file.
                        raise UserError(f"{stored.source}: damaged (ranks read other bytes of the same part)")
            _check(place, stored, boxes)


def _check(place: Place, stored: StoredTensor, boxes: Boxes) -> None:
    value = 0
    for part in boxes.values():
        value ^= part
    try:
        check_remainder(stored, value)
    except UserError:
        # It may be that boxes overlap, as where replicas are cut in other ways, or leave something out.
        with Path(place[0]).open("rb", buffering=0) as file:
            check_whole(file.fileno(), stored)
