"""Checks of --moe-token-dispatcher-type grouped and of the nodes between which it sends."""

from collections import Counter
from collections.abc import Sequence

from megatron_moe.config.base import ConfigError
from megatron_moe.config.domain_placement import cut_into_domains, domain_shares
from megatron_moe.config.moe import expert_degree
from megatron_moe.config.run import RunConfig


def ranks_by_node(ranks: Sequence[int], per_node: int) -> list[int]:
    """How many of `ranks` each node has, in the order of nodes; only nodes that have some."""
    return list(Counter(rank // per_node for rank in ranks).values())


def check_equal_nodes(groups: Sequence[Sequence[int]], per_node: int, world_size: int) -> None:
    """Ranks that exchange tokens through `grouped` must be spread over their nodes in equal numbers.

    Args:
        groups: sets of such ranks.
        per_node: ranks of a node.
        world_size: number of processes.

    Raises:
        ConfigError: they are not; the message says which sizes of a node would do.
    """

    def is_equal(ranks: Sequence[int], size: int) -> bool:
        return len(set(ranks_by_node(ranks, size))) == 1

    wrong = next((ranks for ranks in groups if not is_equal(ranks, per_node)), None)
    if wrong is not None:
        sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
        legal = [size for size in sizes if all(is_equal(ranks, size) for ranks in groups)]
        raise ConfigError(
            f"--ranks-per-node {per_node}: puts {', '.join(map(str, ranks_by_node(wrong, per_node)))} of {len(wrong)} "
            f"ranks that exchange tokens on their nodes; --moe-token-dispatcher-type grouped needs equal numbers, as "
            f"with --ranks-per-node {', '.join(map(str, legal))}"
        )


def check_dispatch(run: RunConfig, experts_per_layer: Sequence[int], world_size: int) -> None:
    """Flags of the grouped dispatcher.

    Args:
        run: all flags.
        experts_per_layer: 0 for a dense layer.
        world_size: number of processes.

    Raises:
        ConfigError: a flag that nobody would use, or one that the dispatcher has no meaning for.
    """
    moe, per_node = run.moe, run.parallel.ranks_per_node
    if moe.moe_token_dispatcher_type != "grouped" or moe.num_experts is None:
        if per_node is not None:
            raise ConfigError(f"--ranks-per-node {per_node}: needs --moe-token-dispatcher-type grouped")
        return
    if moe.moe_pad_expert_input_to_capacity:
        raise ConfigError(
            "--moe-token-dispatcher-type grouped: sends no padding, which --moe-pad-expert-input-to-capacity asks for; "
            "leave that out, or use alltoall"
        )
    if per_node is not None:
        check_equal_nodes(_exchanging(run, experts_per_layer, world_size), per_node, world_size)


def _exchanging(run: RunConfig, experts_per_layer: Sequence[int], world_size: int) -> list[list[int]]:
    """All sets of ranks that exchange tokens in some layer.

    Expert-tensor-parallel ranks are neighbours, then expert-parallel ones
    (`megatron/core/parallel_state.py:initialize_model_parallel`, "tp-cp-ep-dp-pp").
    """
    size, beside = run.parallel.expert_model_parallel_size, run.parallel.expert_tensor_size
    if run.moe.moe_domain_grouped:
        parts = {(group.ranks.start, group.ranks.stop) for group in cut_into_domains(domain_shares(run), size)}
    else:
        degrees = {expert_degree(count, size) or size for count in experts_per_layer if count}
        parts = {(first, first + degree) for degree in degrees for first in range(0, size, degree)}
    return [
        [block + number * beside + place for number in range(*part)]
        for block in range(0, world_size, size * beside)
        for place in range(beside)
        for part in sorted(parts)
    ]
