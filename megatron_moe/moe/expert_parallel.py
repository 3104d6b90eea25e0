"""Expert parallelism of one layer: a layer with fewer experts than expert-parallel ranks is spread over fewer of them.

DeepSpeed-MoE calls it multi-expert and multi-data parallelism (https://arxiv.org/abs/2201.05596). With
--expert-model-parallel-size P a layer of E experts has the degree d of `config/moe.py:expert_degree`. Where d < P, each
d neighbouring ranks hold all experts of the layer and exchange tokens among themselves alone; the P / d ranks at the
same place of such neighbourhoods hold copies of the same experts. So megatron-core gets other process groups in such a
layer:

- `ep`, `tp_ep`: the neighbours, for dispatchers, and for the numbers of a rank's experts in checkpoints;
- `expt_dp`: all ranks that hold the same part of the same experts, of which checkpoints keep the first one's.

Gradients are reduced over the whole size's `expt_dp` by megatron-core and then over the copies by
`training/expert_copies.py`. The norm counts copies once: all but the first are `shared`, an attribute of parameters
that `optimizer/optimizer.py:copy_optimizer_param_metadata` passes on, and that `_filter_grads_for_norm` and
`clip_grads.py:count_zeros_fp32` heed.
"""

import copy
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.config.base import ConfigError
from megatron_moe.config.moe import expert_degree

type Group = dist.ProcessGroup


class LayerGroups(NamedTuple):
    """Process groups of one layer."""

    collection: ProcessGroupCollection
    """For megatron-core's parts of the layer."""
    copies: Group | None
    """Ranks that hold copies of the same experts inside of the expert-parallel group, or None: there are none."""


# By the group of all expert-parallel ranks: when that one goes, these are of no use any more.
_made: WeakKeyDictionary[Group, dict[tuple[int, ...], Group]] = WeakKeyDictionary()


def layer_groups(config: Any, whole: ProcessGroupCollection) -> LayerGroups:
    """The groups of a layer; a collective where they are new (`dispatch/choose.py:make_groups` makes all beforehand).

    Args:
        config: the layer's own.
        whole: the model's groups.

    Raises:
        ConfigError: the layer's experts cannot be spread over the ranks.
    """
    experts, size = config.num_moe_experts, whole.ep.size()
    degree = expert_degree(experts, size)
    if degree is None:
        raise ConfigError(
            f"--num-experts {experts}: must be a divisor or a multiple of --expert-model-parallel-size {size}"
        )
    if degree == size:
        return LayerGroups(whole, None)
    ranks, rank = dist.get_process_group_ranks(whole.ep), whole.ep.rank()
    first = rank - rank % degree
    same_experts = ranks[rank % degree :: degree]
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    layer = groups_among(whole, range(first, first + degree), timeout)
    members = _moved(whole.expt_dp, ranks[rank], same_experts)
    layer.expt_dp = layer.expt_dp_gtp_remat = _group(whole.ep, members, timeout)
    return LayerGroups(layer, _group(whole.ep, same_experts, timeout))


def groups_among(whole: ProcessGroupCollection, places: range, timeout: timedelta) -> ProcessGroupCollection:
    """The model's groups with others for dispatchers, made by their members alone.

    Args:
        whole: the model's groups.
        places: numbers in the expert-parallel group, this rank's among them: they exchange among themselves.
        timeout: of the new groups.
    """
    ranks, rank = dist.get_process_group_ranks(whole.ep), whole.ep.rank()
    own = ranks[places.start : places.stop]
    layer = copy.copy(whole)
    layer.ep = _group(whole.ep, own, timeout)
    layer.tp_ep = _group(whole.ep, _moved(whole.expt_tp, ranks[rank], own), timeout)
    return layer


def mark_copies(experts: torch.nn.Module, copies: Group | None) -> None:
    """Let the gradient norm count the experts of the first of their copies alone; before there is an optimizer."""
    if copies is not None and copies.rank() > 0:
        for parameter in experts.parameters():
            parameter.shared = True  # type: ignore[attr-defined]


def _moved(group: Group, rank: int, ranks: list[int]) -> list[int]:
    """Members of `group`, which holds `rank`, and of its like around each of `ranks`.

    A rank's number is a weighted sum of its places along the axes of parallelism
    (`megatron/core/parallel_state.py:RankGenerator`), so that groups along one axis differ by a constant.
    """
    return [member + other - rank for other in ranks for member in dist.get_process_group_ranks(group)]


def _group(whole: Group, members: Iterable[int], timeout: timedelta) -> Group:
    """The group of these ranks, made by themselves alone."""
    made, ranks = _made.setdefault(whole, {}), tuple(sorted(members))
    if ranks not in made:
        made[ranks] = parallel_state.create_group(
            list(ranks), timeout=timeout, use_local_synchronization=True, group_desc="EXPERTS_OF_A_LAYER"
        )
    return made[ranks]
