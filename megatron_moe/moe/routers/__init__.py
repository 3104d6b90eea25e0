"""Routers by name (`--router`); the registry itself is `config/routers.py`."""

from importlib import import_module
from typing import Any

from megatron_moe.config.routers import ROUTERS


def router_class(name: str) -> Any:
    """The class of a router in the registry."""
    file, _, class_name = ROUTERS[name].partition(".")
    return getattr(import_module(f"{__name__}.{file}"), class_name)
