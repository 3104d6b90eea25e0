"""What a checkpoint of another program is to us: flags, weights, and where each of them belongs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_moe.checkpoint.convert.blocks import Block
from megatron_moe.checkpoint.convert.tensors import TensorSource
from megatron_moe.config.yaml_io import Values


@dataclass(frozen=True)
class ForeignModel:
    """A checkpoint of another program, opened; no weight of it has been read yet."""

    sections: Values
    """The run's sections that make the same model, as `config/yaml_io.py:build_run` takes them."""
    source: TensorSource
    """Its weights, and nothing else: each name in it is in `blocks`."""
    blocks: list[Block]
    """Where every weight is on both sides."""
    tokenizer: Path | None = None
    """Its tokenizer's file, if one lies in the folder."""
    tokenizer_type: str | None = None
    """What `--tokenizer-type` that file needs."""
    notes: tuple[str, ...] = ()
    """What differs in training, and what the user should know: a sentence each."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """What the checkpoint holds besides, by name: why it is not needed."""


def merged(*layers: Values) -> Values:
    """Layers of sections, later ones going over earlier ones, field by field."""
    sections: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for name, values in layer.items():
            sections.setdefault(name, {}).update(values)
    return sections
