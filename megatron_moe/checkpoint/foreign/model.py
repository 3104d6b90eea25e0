"""What a checkpoint of another program is to us: flags, weights, and where each of them belongs."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Block, Box
from megatron_moe.checkpoint.convert.tensors import TensorInfo, TensorSource
from megatron_moe.config.base import UserError
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


class Selected:
    """A `TensorSource` of some tensors of another."""

    def __init__(self, source: TensorSource, infos: Mapping[str, TensorInfo]) -> None:
        self._source, self.infos = source, dict(infos)

    def read(self, box: Box) -> Tensor:
        """A part of a tensor.

        Raises:
            UserError: a file is damaged or has gone, or a weight is not finite.
        """
        tensor = self._source.read(box)
        check_finite(tensor, box.name)
        return tensor


def check_finite(tensor: Tensor, name: str, path: Path | None = None) -> None:
    """A weight that overflowed makes every logit NaN; better said here than found out later.

    Raises:
        UserError: names the tensor, and the file if it is known.
    """
    if tensor.is_floating_point() and (wrong := int((~tensor.isfinite()).sum())):
        where = "" if path is None else f"{path}: "
        raise UserError(
            f"{where}{name} holds {wrong} numbers that are inf or NaN; the run that wrote it had failed, take an "
            "earlier checkpoint of it"
        )


def dtype_notes(infos: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    """DeepSpeed keeps routers in fp32 beside weights in half precision; here all have one type."""
    floats = {name: info for name, info in infos.items() if info.dtype.is_floating_point}
    wide = [name for name, info in floats.items() if info.dtype == torch.float32]
    if not wide or len(wide) == len(floats):
        return ()
    return (
        f"{len(wide)} tensors are fp32 beside others of fewer bits ({wide[0]}); --dtype fp32 keeps them to the bit, "
        "other types round them",
    )


def compact(unused: Mapping[str, str]) -> dict[str, str]:
    """The same, with names that differ in numbers only as one: `layers.*.mlp.dense.bias (24 of them)`."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, reason in unused.items():
        groups[re.sub(r"(?<=[._])\d+(?=[._]|$)", "*", name), reason].append(name)
    return {
        names[0] if len(names) == 1 else f"{pattern} ({len(names)} of them)": reason
        for (pattern, reason), names in groups.items()
    }


def of_training(tree: Mapping[Any, Any], *used: str) -> dict[str, str]:
    """What a file holds beside what was used: the state of the training run, in one line."""
    names = sorted(str(name) for name in tree if name not in used)
    return {", ".join(names): "of the training run"} if names else {}


def merged(*layers: Values) -> Values:
    """Layers of sections, later ones going over earlier ones, field by field."""
    sections: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for name, values in layer.items():
            sections.setdefault(name, {}).update(values)
    return sections
