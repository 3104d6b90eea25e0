"""--moe-domain-grouped: samples of one domain each, in one stream where the domains take turns.

Documents are packed into samples domain by domain, so that a sample holds tokens of its domain only. Every domain has a
`SampleStream` of its own, with epochs of its own: a domain with little text comes around more often. In the stream that
is made of them sample i is of a domain that depends on i and the shares alone, so a run may go on under another layout.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron_moe.config.base import ConfigError
from megatron_moe.data.domains import Domains
from megatron_moe.data.sample_index import DomainOfFile, FilePart
from megatron_moe.data.sample_stream import Sample, SampleStream


class DomainStream(Dataset[Sample]):
    """Endless samples of one split, like `SampleStream`: index it with any number from 0 on.

    Args:
        streams: of every domain.
        shares: samples of each domain among as many as their sum.
        identity: what the stream depends on, by name, for `change_of_data`.
    """

    def __init__(self, streams: Sequence[SampleStream], shares: Sequence[int], identity: Mapping[str, Any]) -> None:
        self._streams = streams
        self._starts = [0, *itertools.accumulate(shares)]
        # Which domain each of a period's numbers belongs to, and how many of them have come before.
        self._turns = [(domain, turn) for domain, share in enumerate(shares) for turn in range(share)]
        self._shares = tuple(shares)
        self.domain_names = streams[0].domain_names
        self.identity = dict(identity)

    @property
    def epoch_sizes(self) -> list[int]:
        """Samples that every domain holds, of all its files."""
        return [sum(stream.epoch_sizes) for stream in self._streams]

    def describe(self) -> str:
        """How often each domain comes around, for the start of a run."""
        names = self.domain_names or ()
        parts = [
            f"{names[domain]} {share} of {len(self._turns)} (an epoch is {size} samples)"
            for domain, (share, size) in enumerate(zip(self._shares, self.epoch_sizes, strict=True))
        ]
        return f"every step reads {', '.join(parts)}"

    def locate(self, position: int) -> tuple[int, int]:
        """Domain of sample `position`, and its number in the domain's own stream."""
        period, place = divmod(position, len(self._turns))
        domain, turn = self._turns[place]
        return domain, period * self._shares[domain] + turn

    def __getitem__(self, position: int) -> Sample:
        domain, number = self.locate(position)
        return self._streams[domain][number] | {"samples": torch.tensor(position)}


def divide_by_domain(
    parts: Sequence[FilePart], weights: Sequence[float], domains: Mapping[str, Domains], num_domains: int, split: str
) -> list[tuple[list[FilePart], list[float]]]:
    """Each domain's part of every file that has text of it, and the weights of these.

    A file gives a domain as much as it would without --moe-domain-grouped: its weight times the domain's share of its
    tokens.

    Args:
        parts: of a split.
        weights: of the files.
        domains: of their documents, by prefix.
        num_domains: of the model.
        split: for errors.

    Raises:
        ConfigError: there is no text of a domain.
    """
    divided = []
    for number in range(num_domains):
        chosen: list[tuple[FilePart, float]] = []
        for part, weight in zip(parts, weights, strict=True):
            known = domains[part.source.prefix]
            if number >= len(known.names):
                continue
            own = replace(part, domain=DomainOfFile(number, known.names[number], known.ids))
            if own.num_tokens:
                chosen.append((own, weight * own.num_tokens / part.num_tokens))
        if not chosen:
            names = next(iter(domains.values())).names
            name = f" ({names[number]})" if number < len(names) else ""
            raise ConfigError(
                f"--moe-domain-grouped: the {split} part of the token files has no text of domain {number}{name}; all "
                f"--num-domains {num_domains} need some"
            )
        divided.append(([part for part, _ in chosen], [weight for _, weight in chosen]))
    return divided
