"""Folders whose experts lie as transformers holds them in memory, shown by the names that it writes by default.

`save_pretrained(..., save_original_format=False)` writes one tensor for the first matrices of all experts of a layer,
`experts.gate_up_proj` [E, 2F, H] with the gates first, and one for the second, `experts.down_proj` [E, H, F]. The maps
of the families are of the default names; here those are parts of these.

Shape legend: E = experts, F = width of an expert, H = hidden size.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Box, whole
from megatron_moe.checkpoint.convert.tensors import TensorInfo, TensorSource
from megatron_moe.checkpoint.hf.families.parts import LLAMA_MLP, MIXTRAL_MLP, GatedNames
from megatron_moe.config.base import UserError

_FIRST = ".experts.gate_up_proj"
_EXPERTS = re.compile(r"(?P<layer>model\.layers\.\d+\.)(?P<block>\w+)\.experts\.(?P<which>gate_up|down)_proj")


class Files(TensorSource, Protocol):
    """Tensors that are read into memory that is there already."""

    def read_into(self, box: Box, out: Tensor) -> None:
        """A part of a tensor, into contiguous memory of its dtype and size."""


@dataclass(frozen=True, slots=True)
class _Naming:
    """What a family's default names differ in."""

    block: str
    """The module of the experts, in place of `mlp`."""
    experts: GatedNames | None
    """Of an expert; None: they are stacked on disk too."""
    gate: tuple[str, str]
    """End of the name of the gate in memory, and on disk."""


_PLAIN = _Naming("mlp", LLAMA_MLP, (".mlp.gate.weight", ".mlp.gate.weight"))
_NAMINGS = {
    "mixtral": _Naming("block_sparse_moe", MIXTRAL_MLP, (".mlp.gate.weight", ".block_sparse_moe.gate.weight")),
    "granitemoeshared": _Naming(
        "block_sparse_moe", None, (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight")
    ),
}


def has_names_of_memory(source: TensorSource) -> bool:
    """Whether a folder has them."""
    return any(name.endswith(_FIRST) for name in source.infos)


class UsualNames:
    """The same tensors by the default names.

    Args:
        source: the files.
        model_type: of their family.

    Raises:
        UserError: experts do not lie as transformers holds them, or the files hold them by both names.
    """

    def __init__(self, source: Files, model_type: str) -> None:
        self._source = source
        naming = _NAMINGS.get(model_type, _PLAIN)
        self._parts: dict[str, tuple[Box, tuple[int, ...]]] = {}
        for stored, info in source.infos.items():
            for name, part, shape in _default_names(stored, info.shape, naming):
                if name in self._parts:
                    first = self._parts[name][0].name
                    raise UserError(f"{stored}: is in {first} a second time; the files are of two models")
                self._parts[name] = (part, shape)
        self.infos = {
            name: TensorInfo(shape, source.infos[part.name].dtype) for name, (part, shape) in self._parts.items()
        }

    def read(self, box: Box) -> Tensor:
        """A part of a tensor."""
        return self._source.read(self._place(box)).view(box.size)

    def read_into(self, box: Box, out: Tensor) -> None:
        """A part of a tensor, into contiguous memory of its dtype and size."""
        place = self._place(box)
        self._source.read_into(place, out.view(place.size))

    def _place(self, box: Box) -> Box:
        """Where a part of a tensor is in the files."""
        part, _ = self._parts[box.name]
        front = len(part.start) - len(box.start)
        inner = zip(part.start[front:], box.start, strict=True)
        start = (*part.start[:front], *(first + step for first, step in inner))
        return Box(part.name, start, (1,) * front + box.size)


def _default_names(name: str, shape: tuple[int, ...], naming: _Naming) -> Iterator[tuple[str, Box, tuple[int, ...]]]:
    """Default names of what a stored tensor holds, where in it each is, and its shape."""
    match = _EXPERTS.fullmatch(name)
    if match is None:
        in_memory, on_disk = naming.gate
        usual = name.removesuffix(in_memory) + on_disk if name.endswith(in_memory) else name
        yield usual, whole(name, shape), shape
        return
    beginning = f"{match['layer']}{naming.block}."
    if naming.experts is None:
        ending = {"gate_up": "input_linear", "down": "output_linear"}[match["which"]]
        yield f"{beginning}{ending}.weight", whole(name, shape), shape
        return
    first = (naming.experts.gate, naming.experts.up)
    names = first if match["which"] == "gate_up" else (naming.experts.down,)
    if len(shape) != 3 or 0 in shape or shape[1] % len(names):
        needed = "[experts, 2 x width, hidden]" if len(names) == 2 else "[experts, hidden, width]"
        raise UserError(f"{name}: has the shape {list(shape)}; must be {needed}")
    count, rows, columns = shape
    height = rows // len(names)
    for expert in range(count):
        for place, matrix in enumerate(names):
            part = Box(name, (expert, place * height, 0), (1, height, columns))
            yield f"{beginning}experts.{expert}.{matrix}.weight", part, (height, columns)
