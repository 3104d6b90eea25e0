"""Counts what the ranks of an expert-parallel group send each other: messages and bytes, by the link they take.

    with count_traffic() as traffic:
        loss.backward()
    traffic.volume(link=Link.OTHER_NODE).messages

Off by default: without a counter, an exchange asks one list whether it is empty. A rank counts what it sends. Nodes
are those of `--ranks-per-node`, or of the launcher. A message is what one collective carries from one rank to another,
if it carries anything; what stays on the rank has a link of its own. What expert tensor parallelism gathers and sums
beside the exchange is not counted; the counts for it are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum


class Link(StrEnum):
    """What lies between the sender and the receiver of a message."""

    SAME_RANK = "same rank"
    SAME_NODE = "same node"
    OTHER_NODE = "other node"


class Phase(StrEnum):
    """What a collective is for."""

    COUNTS = "counts"
    """How many rows will come; before anything else."""
    DISPATCH = "dispatch"
    """Tokens to their experts; in the backward pass their gradients back."""
    COMBINE = "combine"
    """The experts' output back; in the backward pass its gradients to the experts."""


@dataclass(frozen=True)
class Volume:
    """Messages, and bytes of hidden rows (payload) and of all else: weights, maps and counts (metadata)."""

    messages: int = 0
    payload: int = 0
    metadata: int = 0

    def __add__(self, other: "Volume") -> "Volume":
        return Volume(self.messages + other.messages, self.payload + other.payload, self.metadata + other.metadata)

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.payload + self.metadata


@dataclass
class Traffic:
    """What this rank sent while it was counted."""

    volumes: dict[tuple[Phase, bool, Link], Volume] = field(default_factory=dict)
    """By phase, whether it was in a backward pass, and link."""

    def add(self, phase: Phase, backward: bool, link: Link, volume: Volume) -> None:
        """Count one message."""
        key = (phase, backward, link)
        self.volumes[key] = self.volumes.get(key, Volume()) + volume

    def volume(self, *, phase: Phase | None = None, backward: bool | None = None, link: Link | None = None) -> Volume:
        """The sum of what has these properties; None means any."""
        wanted = (phase, backward, link)
        total = Volume()
        for key, volume in self.volumes.items():
            if all(want is None or want == value for want, value in zip(wanted, key, strict=True)):
                total += volume
        return total


_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank sends inside of the block. Blocks may be nested: each counts all that happens in it."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        # By identity: two counters with equal numbers are equal.
        _counting[:] = [other for other in _counting if other is not traffic]


def is_counting() -> bool:
    """Whether anybody counts."""
    return bool(_counting)


def record(
    phase: Phase, backward: bool, links: Sequence[Link], rows: Sequence[int], payload: int, metadata: int
) -> None:
    """A collective sends `rows[i]` rows over `links[i]`, of so many bytes each."""
    for link, count in zip(links, rows, strict=True):
        if count and payload + metadata:
            for traffic in _counting:
                traffic.add(phase, backward, link, Volume(1, count * payload, count * metadata))
