"""Our own flags in a config.json, under the key `megatron_moe`: an export of ours comes back as exactly what it was.

    "megatron_moe": {"version": "0.1.0", "model": {"num_layers": 24, ...}, "moe": {...}, "routing": {...}}

The sections hold what differs from the defaults. Other programs pass over the key.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_moe import __version__
from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.schema import run_sections
from megatron_moe.config.yaml_io import Values, parse_section

KEY = "megatron_moe"
SOURCE = f"config.json: {KEY}"
SECTIONS = ("model", "moe", "routing")
NOT_WRITTEN = frozenset(
    {
        # How and where it is computed: a matter of the machine that the model comes to.
        "transformer_impl",
        "attention_backend",
        "moe_expert_backend",
        "moe_token_dispatcher_type",
        "moe_domain_grouped",
        # A file of the machine that it comes from.
        "router_token_counts",
    }
)


def own_flags(run: RunConfig) -> dict[str, Any]:
    """What stands under the key."""
    sections: dict[str, Any] = {}
    for name in SECTIONS:
        section = getattr(run, name)
        sections[name] = {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(section)
            if (value := getattr(section, field.name)) != field.default and field.name not in NOT_WRITTEN
        }
    return {"version": __version__, **{name: values for name, values in sections.items() if values}}


def read_own_flags(config: Mapping[str, Any]) -> Values | None:
    """The sections under the key, with their types checked; None where there is no key.

    Raises:
        UserError: they are not what this version knows.
    """
    own = config.get(KEY)
    if own is None:
        return None
    if not isinstance(own, dict):
        raise UserError(f"{SOURCE}: must be a mapping of {', '.join(SECTIONS)}; take it out to read the other fields")
    unknown = [name for name in own if name not in (*SECTIONS, "version")]
    if unknown:
        raise UserError(f"{SOURCE}.{unknown[0]}: unknown; it has {', '.join(SECTIONS)}")
    kinds = run_sections(RunConfig)
    return {name: parse_section(own[name], f"{SOURCE}.{name}", kinds[name]) for name in SECTIONS if name in own}
