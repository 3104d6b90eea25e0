"""Which ranks of an expert-parallel group share a node, and the process groups between and inside of nodes.

A rank's node is its global rank divided by the ranks of a node. The group is laid out as nodes x places: rank (q, l) is
the l-th rank of the group on its q-th node.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from megatron_moe.config.base import ConfigError
from megatron_moe.config.dispatch import check_equal_nodes, ranks_by_node
from megatron_moe.moe.dispatch.counters import Link


def ranks_per_node(given: int | None) -> int:
    """Ranks of one node: as --ranks-per-node says, else the launcher (LOCAL_WORLD_SIZE), else one node has all."""
    return given or int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or dist.get_world_size()


def check_launcher(group: dist.ProcessGroup) -> None:
    """The launcher must say the same on all ranks of a group; nodes are drawn after it.

    Raises:
        ConfigError: nodes run different numbers of processes.
    """
    here = ranks_per_node(None)
    extremes = torch.tensor([here, -here], device=torch.cuda.current_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    most, least = int(extremes[0]), -int(extremes[1])
    if most != least:
        raise ConfigError(
            f"--moe-token-dispatcher-type grouped: nodes run {least} to {most} processes; start as many on each, or "
            "give --ranks-per-node"
        )


@dataclass(frozen=True)
class NodeGrid:
    """An expert-parallel group as nodes x places."""

    nodes: int
    places: int

    @property
    def levels(self) -> tuple[int, ...]:
        """Destinations of each level of an exchange: between nodes, then inside of one. A level that has one
        destination is left out."""
        return tuple(size for size in (self.nodes, self.places) if size > 1) or (1,)


def node_grid(ranks: Sequence[int], per_node: int) -> NodeGrid:
    """Lay a group out.

    Args:
        ranks: global ranks of the group, in ascending order.
        per_node: ranks of one node.

    Raises:
        ConfigError: nodes hold different numbers of the group's ranks.
    """
    check_equal_nodes([ranks], per_node, dist.get_world_size() if dist.is_initialized() else max(ranks) + 1)
    places = ranks_by_node(ranks, per_node)[0]
    return NodeGrid(len(ranks) // places, places)


def links(ranks: Sequence[int], per_node: int, rank: int) -> list[Link]:
    """What lies between `rank` and each of `ranks`."""
    return [
        Link.SAME_RANK
        if other == rank
        else Link.SAME_NODE
        if other // per_node == rank // per_node
        else Link.OTHER_NODE
        for other in ranks
    ]


def groups_of_levels(config: Any, whole: dist.ProcessGroup) -> tuple[dist.ProcessGroup, ...]:
    """`level_groups` of a layer whose experts are spread over `whole`."""
    grid = node_grid(dist.get_process_group_ranks(whole), ranks_per_node(config.ranks_per_node))
    return level_groups(whole, grid, config.distributed_timeout_minutes)


# By the expert-parallel group: layers with the same one share them, and they go when it goes.
_made: WeakKeyDictionary[dist.ProcessGroup, dict[NodeGrid, tuple[dist.ProcessGroup, ...]]] = WeakKeyDictionary()


def level_groups(whole: dist.ProcessGroup, grid: NodeGrid, timeout_minutes: int) -> tuple[dist.ProcessGroup, ...]:
    """For each of `grid.levels` the group that this rank exchanges with: ranks of its place on all nodes, then ranks of
    its node.

    All ranks of `whole` must call this together, before they build their layers (`choose.py:make_groups`).
    """
    from megatron.core import parallel_state

    made = _made.setdefault(whole, {})
    if grid not in made:
        ranks = dist.get_process_group_ranks(whole)
        node, place = divmod(whole.rank(), grid.places)
        members = {
            "BETWEEN_NODES": ranks[place :: grid.places],
            "INSIDE_OF_A_NODE": ranks[node * grid.places : (node + 1) * grid.places],
        }
        # Both, also where one level is left out: torch names a group that its members make by themselves after how many
        # each has made before (distributed_c10d.py:_hash_ranks_to_str), and later groups hold ranks of several `whole`,
        # of which some may lie on one node and some not.
        groups = tuple(
            parallel_state.create_group(
                part, timeout=timedelta(minutes=timeout_minutes), use_local_synchronization=True, group_desc=name
            )
            for name, part in members.items()
        )
        made[grid] = groups if len(grid.levels) > 1 else (whole,)
    return made[grid]
