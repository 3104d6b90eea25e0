"""--moe-domain-grouped: which ranks hold the experts of which domains, and which sequences they read.

An expert-parallel group holds the experts of a layer in order, and so those of a domain on neighbouring ranks
(`routing.py:domain_groups`). It is cut wherever a domain and a rank begin together: between two cuts there are the
ranks of one domain, or one rank with several domains. Domains begin at the same share of the experts in every layer,
so all layers are cut at the same ranks.

A step reads from every domain as many sequences as its share of the experts says. Which sequences these are does not
depend on the layout: every layout takes them from one numbered stream (`data/domain_stream.py`), where the domains take
turns.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moe.config.base import ConfigError, format_value
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.routing import RoutingConfig
from megatron_moe.config.run import RunConfig


@dataclass(frozen=True)
class DomainRanks:
    """Ranks of an expert-parallel group that keep the tokens of some domains among themselves."""

    domains: range
    ranks: range
    """Numbers in the expert-parallel group."""
    share: tuple[range, int]
    """Their parts of all parts of the experts, and how many parts there are."""

    def experts(self, count: int) -> range:
        """Their experts in a layer of `count`."""
        parts, total = self.share
        return range(parts.start * count // total, parts.stop * count // total)


def domain_shares(run: RunConfig) -> tuple[int, ...]:
    """Experts of each domain, and sequences of each in a step, relative to each other."""
    return shares_of(run.model.num_domains or 1, run.routing)


def shares_of(domains: int, routing: RoutingConfig) -> tuple[int, ...]:
    """As `domain_shares`."""
    return routing.router_domain_shares or (1,) * domains


def cut_into_domains(shares: Sequence[int], ranks: int) -> list[DomainRanks]:
    """Cut an expert-parallel group wherever a domain and a rank begin together.

    Args:
        shares: experts of each domain, relative to each other.
        ranks: of the group; they hold equal numbers of experts.
    """
    total = sum(shares)
    starts = [0, *itertools.accumulate(shares)]
    cuts = [(domain, start) for domain, start in enumerate(starts) if start * ranks % total == 0]
    return [
        DomainRanks(
            range(domain, next_domain), range(start * ranks // total, end * ranks // total), (range(start, end), total)
        )
        for (domain, start), (next_domain, end) in itertools.pairwise(cuts)
    ]


@dataclass(frozen=True)
class Turns:
    """Numbers of a stream in which domains take turns: of every `period` of them `width`, beginning with `first`."""

    first: int = 0
    width: int = 1
    period: int = 1

    def begin(self, consumed: int) -> int:
        """How many of these numbers come before a step that begins after `consumed` numbers of the stream.

        A run that began without --moe-domain-grouped may stand in the middle of a period; the rest of it is left out.
        """
        return -(-consumed // self.period) * self.width

    def number(self, place: int) -> int:
        """The stream's number at a place among these."""
        period, offset = divmod(place, self.width)
        return period * self.period + self.first + offset


@dataclass(frozen=True)
class StreamPart:
    """What a data-parallel rank reads: it is number `index` of `count` that share out the numbers of `turns`."""

    turns: Turns
    index: int
    count: int


def stream_part(run: RunConfig, replica: int, replicas: int) -> StreamPart:
    """What a data-parallel rank reads.

    Args:
        run: flags that `check_domain_groups` has passed.
        replica, replicas: number of the data-parallel rank, and of how many.
    """
    if not run.moe.moe_domain_grouped:
        return StreamPart(Turns(), replica, replicas)
    groups = cut_into_domains(domain_shares(run), run.parallel.expert_model_parallel_size)
    if len(groups) == 1:
        _, period = groups[0].share
        return StreamPart(Turns(0, period, period), replica, replicas)
    # Ranks of a pipeline stage are numbered tensor first, then context, then data; and expert-tensor first, then expert
    # (megatron/core/parallel_state.py:RankGenerator, order tp-cp-ep-dp-pp).
    parallel = run.parallel
    wide = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    whole = parallel.expert_model_parallel_size * parallel.expert_tensor_size // wide
    before, place = divmod(replica, whole)
    for group in groups:
        first, last = (rank * parallel.expert_tensor_size // wide for rank in (group.ranks.start, group.ranks.stop))
        if first <= place < last:
            parts, period = group.share
            held = last - first
            turns = Turns(parts.start, len(parts), period)
            return StreamPart(turns, before * held + place - first, replicas // whole * held)
    raise AssertionError(f"replica {replica} is in none of {groups}")


def check_domain_groups(run: RunConfig, experts_per_layer: Sequence[int], replicas: int) -> None:
    """--moe-domain-grouped needs domains that fill whole ranks, and batches that the domains can share.

    Args:
        run: flags; those of the router are checked already (`routing.py:check_domains`).
        experts_per_layer: 0 for a dense layer.
        replicas: data-parallel size.

    Raises:
        ConfigError: something does not fit; names the flag.
    """
    if not run.moe.moe_domain_grouped:
        return
    _check_company(run.moe)
    shares, parallel = domain_shares(run), run.parallel
    ranks = parallel.expert_model_parallel_size
    for number, count in enumerate(experts_per_layer, 1):
        if count % ranks:
            raise ConfigError(
                f"--moe-domain-grouped: every layer's experts must be a multiple of --expert-model-parallel-size "
                f"{ranks}, so that a domain has the same ranks in all layers; layer {number} has {count}"
            )
    groups = cut_into_domains(shares, ranks)
    _check_cuts(run, shares, groups, experts_per_layer)
    _check_replicas(parallel, groups)
    _check_batch(run, shares, replicas)


def _check_company(moe: MoEConfig) -> None:
    for flag, value, needed in (
        ("--router", moe.router, "random-routed"),
        ("--moe-token-dispatcher-type", moe.moe_token_dispatcher_type, "grouped"),
    ):
        if value != needed:
            raise ConfigError(f"--moe-domain-grouped: needs {flag} {needed}, not {value}")


def _check_cuts(
    run: RunConfig, shares: Sequence[int], groups: Sequence[DomainRanks], experts_per_layer: Sequence[int]
) -> None:
    wrong = next((group for group in groups if len(group.domains) > 1 and len(group.ranks) > 1), None)
    if wrong is None:
        return
    ranks = run.parallel.expert_model_parallel_size
    number, count = next((number, count) for number, count in enumerate(experts_per_layer, 1) if count)
    # The first domain's end: a cut in front of it, none behind it.
    domain = wrong.domains.start
    end = sum(shares[: domain + 1]) * count // sum(shares)
    legal = [
        size
        for size in range(1, count + 1)
        if all(experts % size == 0 for experts in experts_per_layer)
        and all(len(group.domains) == 1 or len(group.ranks) == 1 for group in cut_into_domains(shares, size))
    ]
    raise ConfigError(
        f"--expert-model-parallel-size {ranks}: with --moe-domain-grouped every domain must have ranks of its own, or "
        f"lie on one rank with others; in layer {number} the experts of domain {domain} end before expert {end}, and a "
        f"rank holds {count // ranks}; {format_value(tuple(legal))} would be right"
    )


def _check_replicas(parallel: ParallelConfig, groups: Sequence[DomainRanks]) -> None:
    wide = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    for group in groups if len(groups) > 1 else ():
        held = len(group.ranks) * parallel.expert_tensor_size
        if held % wide:
            raise ConfigError(
                f"--moe-domain-grouped: a sequence is on --tensor-model-parallel-size "
                f"{parallel.tensor_model_parallel_size} x --context-parallel-size {parallel.context_parallel_size} = "
                f"{wide} ranks, the experts of domain {group.domains.start} on {len(group.ranks)} x "
                f"--expert-tensor-parallel-size {parallel.expert_tensor_size} = {held}, which must be a multiple"
            )


def _check_batch(run: RunConfig, shares: Sequence[int], replicas: int) -> None:
    total, training = sum(shares), run.training
    size = training.batch_size(replicas)
    what = (
        f"--router-domain-shares {format_value(tuple(shares))}" if run.routing.router_domain_shares else "--num-domains"
    )
    if size % total:
        raise ConfigError(
            f"--global-batch-size {size}: must be a multiple of {total} ({what}) with --moe-domain-grouped, so that "
            "every step has each domain's share"
        )
    for number in (training.rampup_batch_size or ())[:2]:
        if number % total:
            raise ConfigError(
                f"--rampup-batch-size {format_value(training.rampup_batch_size)}: START and INCREMENT must be "
                f"multiples of {total} ({what}) with --moe-domain-grouped"
            )
