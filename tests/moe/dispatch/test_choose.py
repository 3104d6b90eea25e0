"""Which dispatcher a layer gets, and what ours rely on of upstream's."""

from typing import Any

from tests.helpers.distributed import run_ranks
from tests.moe.dispatch.cases import Case, make_config, make_dispatcher, make_groups
from tests.moe.dispatch.test_dispatchers import start

STEPS = {
    "dispatch_preprocess",
    "token_dispatch",
    "dispatch_postprocess",
    "combine_preprocess",
    "token_combine",
    "combine_postprocess",
}


def look() -> dict[str, Any]:
    import torch
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoETokenDispatcher

    from megatron_moe.moe.dispatch.choose import replace_dispatcher

    start()
    case = Case(ep=2, experts=4)
    groups = make_groups([case, Case(ep=1, experts=4)])
    ours, stock = (make_dispatcher(case, groups, kind) for kind in ("alltoall", "stock"))
    config = make_config(case, "allgather")
    config.expert_model_parallel_size = 1
    upstream = MoEAllGatherTokenDispatcher(4, [0, 1, 2, 3], config, get_default_pg_collection())
    stock.preprocess(torch.ones(12, 4, dtype=torch.bool))
    return {
        "steps": {name for name, value in vars(MoETokenDispatcher).items() if hasattr(value, "__isabstractmethod__")},
        "missing": [
            name
            for name in (
                "input_splits",
                "output_splits",
                "output_splits_tp",
                "num_out_tokens",
                "num_global_tokens_per_local_expert",
                "drop_and_pad",
                "_maybe_dtoh_and_synchronize",
            )
            if not hasattr(stock, name)
        ],
        "kinds": [
            type(dispatcher).__name__
            for dispatcher in (
                ours,
                make_dispatcher(case, groups, "grouped"),
                make_dispatcher(Case(ep=1, experts=4), groups, "grouped"),
                replace_dispatcher(upstream, config, get_default_pg_collection()),
            )
        ],
    }


def test_upstream_has_what_ours_take_from_it() -> None:
    for rank in run_ranks(2, look):
        assert rank["steps"] == STEPS, "MoETokenDispatcher has other steps: see moe/dispatch/grouped.py"
        assert rank["missing"] == [], "MoEAlltoAllTokenDispatcher has changed: see moe/dispatch/alltoall.py"
        assert rank["kinds"] == [
            "AllToAllDispatcher",
            "GroupedDispatcher",
            "AllToAllDispatcher",
            "MoEAllGatherTokenDispatcher",
        ]
