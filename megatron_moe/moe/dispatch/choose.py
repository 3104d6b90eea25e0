"""Which dispatcher a layer gets, and the process groups of all layers."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher
from megatron_moe.moe.dispatch.domains import domain_dispatcher, own_domains
from megatron_moe.moe.dispatch.grouped import GroupedDispatcher
from megatron_moe.moe.dispatch.nodes import check_launcher, groups_of_levels
from megatron_moe.moe.expert_parallel import layer_groups


def replace_dispatcher(
    upstream: MoETokenDispatcher, config: Any, pg_collection: ProcessGroupCollection
) -> MoETokenDispatcher:
    """What stands in the place of the dispatcher that upstream's layer has built: ours for `alltoall` and `grouped`,
    else that one. On one rank nothing travels, and `grouped` is `alltoall`.

    Args:
        upstream: the layer's.
        config: of the layer.
        pg_collection: of the layer, of which all ranks of `ep` call this together.
    """
    kind = config.moe.moe_token_dispatcher_type
    if kind not in ("alltoall", "grouped"):
        return upstream
    grouped = kind == "grouped" and upstream.ep_size > 1
    dispatcher: Any = GroupedDispatcher if grouped else AllToAllDispatcher
    if grouped and config.moe.moe_domain_grouped:
        dispatcher = domain_dispatcher
    return dispatcher(upstream.num_local_experts, upstream.local_expert_indices, config, pg_collection)


def make_groups(config: Any, whole: ProcessGroupCollection) -> None:
    """Make the process groups of all layers of the model; a collective, before any layer is built.

    On every rank, also for layers of other pipeline stages: torch names a group that its members make by themselves
    after how many groups each of them has made before, so that ranks that make one later would wait for other names.

    Args:
        config: of the model.
        whole: its groups.

    Raises:
        ConfigError: the launcher says that nodes run different numbers of processes.
    """
    if whole.ep.size() == 1:
        return
    grouped = config.moe.moe_token_dispatcher_type == "grouped"
    if grouped and config.ranks_per_node is None:
        check_launcher(whole.ep)
    for experts in dict.fromkeys(count for count in config.experts_per_layer if count):
        layer_config = config.get_config_for_layer(config.experts_per_layer.index(experts) + 1)
        groups = layer_groups(layer_config, whole).collection
        if grouped and config.moe.moe_domain_grouped:
            _, groups = own_domains(layer_config, groups)
        if grouped:
            groups_of_levels(layer_config, groups.ep)
