"""Routers by name (`--router`). A router is one file, one class, one line here."""

from megatron_moe.moe.routers.topk import TopKRouter

ROUTERS = {"topk": TopKRouter}
