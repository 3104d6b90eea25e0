"""Which ranks hold which domains, what they read, and every way in which flags do not fit --moe-domain-grouped."""

import itertools
from typing import Any

import pytest

from megatron_moe.config.base import ConfigError
from megatron_moe.config.domain_placement import cut_into_domains, domain_shares, stream_part
from megatron_moe.config.routing import domain_groups
from megatron_moe.config.run import RunConfig
from megatron_moe.config.validate import validate
from tests.helpers.tiny import tiny_run

GROUPED = {
    "router": "random-routed",
    "num_domains": 2,
    "moe_token_dispatcher_type": "grouped",
    "moe_domain_grouped": True,
    "vocab_size": 128,
}


def grouped_run(**flags: Any) -> RunConfig:
    return tiny_run(**(GROUPED | flags))


@pytest.mark.parametrize(
    "shares", [(1,), (1, 1), (1, 1, 1, 1), (3, 1), (1, 3), (2, 1, 1), (1, 2, 1), (5, 2, 1), (1, 1, 1)]
)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_expert_of_a_domain_lies_on_its_ranks_and_no_other_does(shares: tuple[int, ...], ranks: int) -> None:
    """In layers of different size, against the router's own groups and equal blocks of experts on ranks."""
    cuts = cut_into_domains(shares, ranks)
    assert [rank for cut in cuts for rank in cut.ranks] == list(range(ranks))
    assert [domain for cut in cuts for domain in cut.domains] == list(range(len(shares)))
    for factor in (1, 3):
        experts = sum(shares) * ranks * factor
        groups = domain_groups(experts, len(shares), shares)
        for cut in cuts:
            own = [expert for domain in cut.domains for expert in groups[domain]]
            held = experts // ranks
            assert own == list(range(cut.ranks.start * held, cut.ranks.stop * held)) == list(cut.experts(experts))


def test_groups_are_as_small_as_they_can_be() -> None:
    def ranks_of(shares: tuple[int, ...], ranks: int) -> list[tuple[int, int]]:
        return [(len(cut.domains), len(cut.ranks)) for cut in cut_into_domains(shares, ranks)]

    assert ranks_of((1, 1), 4) == [(1, 2), (1, 2)]
    assert ranks_of((1, 1, 1, 1), 2) == [(2, 1), (2, 1)]
    assert ranks_of((3, 1), 4) == [(1, 3), (1, 1)]
    assert ranks_of((2, 1, 1), 2) == [(1, 1), (2, 1)]
    assert ranks_of((1, 1, 1), 2) == [(3, 2)], "the middle domain is on both ranks"


LAYOUTS: list[tuple[int, dict[str, int]]] = [
    (1, {}),
    (2, {"expert_model_parallel_size": 2}),
    (4, {"expert_model_parallel_size": 4}),
    (8, {"expert_model_parallel_size": 4}),
    (4, {"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    (8, {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    (8, {"expert_model_parallel_size": 4, "tensor_model_parallel_size": 2}),
    (8, {"expert_model_parallel_size": 4, "context_parallel_size": 2}),
    (8, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}),
]


# Two equal domains fit every layout; of three parts to one, only those where a quarter of the experts has a rank.
FITTING = [(sizes, shares) for _, sizes in (LAYOUTS[0], *LAYOUTS[2:4], LAYOUTS[6]) for shares in ((3, 1), (1, 3))]


@pytest.mark.parametrize(("world", "sizes"), LAYOUTS, ids=[f"{world} {sizes}" for world, sizes in LAYOUTS])
@pytest.mark.parametrize("shares", [None, (3, 1), (1, 3)])
def test_ranks_read_a_step_together_and_only_their_own_domains(
    world: int, sizes: dict[str, int], shares: tuple[int, ...] | None
) -> None:
    run = grouped_run(
        **sizes, router_domain_shares=shares, micro_batch_size=1, global_batch_size=16, num_experts=(8, 16)
    )
    if shares is None:
        validate(run, world)
    elif (sizes, shares) not in FITTING:
        with pytest.raises(ConfigError):
            validate(run, world)
        return
    replicas = run.parallel.data_parallel_size(world)
    share = 16 // replicas
    for consumed in (0, 16, 64):
        read = []
        for replica in range(replicas):
            part = stream_part(run, replica, replicas)
            begin = part.turns.begin(consumed) + part.index
            numbers = [part.turns.number(begin + turn * part.count) for turn in range(share)]
            assert {domain_of(run, number) for number in numbers} <= domains_of_replica(run, replica)
            read += numbers
        assert sorted(read) == list(range(consumed, consumed + 16))


def domain_of(run: RunConfig, number: int) -> int:
    shares = domain_shares(run)
    place = number % sum(shares)
    return next(domain for domain, end in enumerate(itertools.accumulate(shares)) if place < end)


def domains_of_replica(run: RunConfig, replica: int) -> set[int]:
    """From megatron-core's numbering of ranks: all expert-parallel ranks that a replica's ranks are."""
    parallel = run.parallel
    wide = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    ranks = range(replica * wide, (replica + 1) * wide)
    numbers = {rank // parallel.expert_tensor_size % parallel.expert_model_parallel_size for rank in ranks}
    held = [
        cut
        for cut in cut_into_domains(domain_shares(run), parallel.expert_model_parallel_size)
        if numbers & set(cut.ranks)
    ]
    assert len(held) == 1, "a replica's tokens start from ranks of one group"
    return set(held[0].domains)


def test_a_run_that_stands_inside_a_period_goes_on_with_the_next() -> None:
    run = grouped_run(expert_model_parallel_size=2)
    parts = [stream_part(run, replica, 2) for replica in range(2)]
    assert [part.turns.number(part.turns.begin(7)) for part in parts] == [8, 9]


@pytest.mark.parametrize(
    ("world", "flags", "message"),
    [
        (
            4,
            {"router": "hash", "domain_embedding": True},
            "--moe-domain-grouped: needs --router random-routed, not hash",
        ),
        (
            4,
            {"moe_token_dispatcher_type": "alltoall"},
            "--moe-domain-grouped: needs --moe-token-dispatcher-type grouped, not alltoall",
        ),
        (
            4,
            {"num_domains": 4, "router_domain_shares": (1, 1, 1, 5), "num_experts": (8, 16), "global_batch_size": 16},
            "--expert-model-parallel-size 4: with --moe-domain-grouped every domain must have ranks of its own, or lie "
            "on one rank with others; in layer 2 the experts of domain 2 end before expert 3, and a rank holds 2; 1 8 "
            "would be right",
        ),
        (
            8,
            {"num_experts": (4, 8), "expert_model_parallel_size": 8},
            "--moe-domain-grouped: every layer's experts must be a multiple of --expert-model-parallel-size 8, so that "
            "a domain has the same ranks in all layers; layer 2 has 4",
        ),
        (
            4,
            {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "expert_model_parallel_size": 2},
            "--moe-domain-grouped: a sequence is on --tensor-model-parallel-size 2 x --context-parallel-size 1 = 2 "
            "ranks, the experts of domain 0 on 1 x --expert-tensor-parallel-size 1 = 1, which must be a multiple",
        ),
        (
            1,
            {"expert_model_parallel_size": 1, "global_batch_size": 9, "micro_batch_size": 1},
            "--global-batch-size 9: must be a multiple of 2 (--num-domains) with --moe-domain-grouped, so that every "
            "step has each domain's share",
        ),
        (
            1,
            {"expert_model_parallel_size": 1, "router_domain_shares": (3, 1), "global_batch_size": 6},
            "--global-batch-size 6: must be a multiple of 4 (--router-domain-shares 3 1) with --moe-domain-grouped, so "
            "that every step has each domain's share",
        ),
        (
            1,
            {
                "expert_model_parallel_size": 1,
                "micro_batch_size": 1,
                "global_batch_size": 8,
                "rampup_batch_size": (5, 3, 16),
            },
            "--rampup-batch-size 5 3 16: START and INCREMENT must be multiples of 2 (--num-domains) with "
            "--moe-domain-grouped",
        ),
    ],
)
def test_flags_that_do_not_fit(world: int, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(grouped_run(**({"expert_model_parallel_size": 4} | flags)), world)
    assert str(error.value) == message
