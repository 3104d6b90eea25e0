"""Which dispatcher a layer gets."""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from megatron_moe.moe.dispatch.alltoall import AllToAllDispatcher
from megatron_moe.moe.dispatch.domains import domain_dispatcher
from megatron_moe.moe.dispatch.grouped import GroupedDispatcher


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
