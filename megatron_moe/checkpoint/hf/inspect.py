"""What lies in a checkpoint: tensors, shapes, types, experts per layer, bytes. Only headers and indices are read."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import TensorStorageMetadata

from megatron_moe.checkpoint.convert.safetensors_files import SafetensorsSource
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.foreign.deepspeed import open_deepspeed
from megatron_moe.checkpoint.foreign.model import ForeignModel
from megatron_moe.checkpoint.foreign.pai import open_pai
from megatron_moe.checkpoint.layout import CONFIG_FILE, LATEST_FILE, checkpoint_folder, find_checkpoint
from megatron_moe.checkpoint.text_files import read_object
from megatron_moe.checkpoint.torch_metadata import FILE as METADATA_FILE
from megatron_moe.checkpoint.torch_metadata import read_metadata
from megatron_moe.config.base import UserError
from megatron_moe.config.yaml_io import build_run, load_saved_run
from megatron_moe.moe.layout import expert_layout

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
_ONE_EXPERT = re.compile(r"\.experts\.(?:local_experts\.|deepspeed_experts\.)?(\d+)\.")
# Experts of a layer in one tensor: ours, transformers' own, Granite's.
_STACKED = re.compile(r"\.experts(?:\.experts)?\.(?:linear_fc1\.weight|gate_up_proj)$|moe\.input_linear\.weight$")
_STATE_PREFIXES = ("optimizer.", "rng_state", "chained_", "common_state")


@dataclass(frozen=True)
class Inventory:
    """A checkpoint's content."""

    path: Path
    kind: str
    """What it is, with the class or the step."""
    tensors: Mapping[str, TensorInfo]
    """Weights by name."""
    experts_per_layer: tuple[int, ...]
    """0 for layers without; empty where there is no layer with experts."""
    file_bytes: int
    """Of all files."""
    state: Mapping[str, TensorInfo] = field(default_factory=dict)
    """Tensors of an optimizer."""

    @property
    def parameters(self) -> int:
        """Numbers in all weights."""
        return sum(prod(info.shape) for info in self.tensors.values())

    def to_json(self) -> dict[str, Any]:
        """All of it, with every tensor."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "parameters": self.parameters,
            "weight_bytes": sum(info.nbytes for info in self.tensors.values()),
            "state_bytes": sum(info.nbytes for info in self.state.values()),
            "file_bytes": self.file_bytes,
            "parameters_of_dtype": parameters_of_dtype(self.tensors),
            "experts_per_layer": list(self.experts_per_layer),
            "tensors": [
                {"name": name, "shape": list(info.shape), "dtype": dtype_name(info), "bytes": info.nbytes}
                for name, info in self.tensors.items()
            ],
        }

    def lines(self) -> list[str]:
        """A screen about it; tensors that differ only in their numbers share a line."""
        weights = sum(info.nbytes for info in self.tensors.values())
        types = ", ".join(f"{count:,} {name}" for name, count in parameters_of_dtype(self.tensors).items())
        lines = [
            f"{self.path}: {self.kind}",
            f"parameters  {self.parameters:,} in {len(self.tensors)} tensors: {types}",
            f"bytes       {weights:,} of weights, {self.file_bytes:,} of files",
        ]
        if self.state:
            state = sum(info.nbytes for info in self.state.values())
            lines.append(f"optimizer   {state:,} bytes in {len(self.state)} tensors")
        if self.experts_per_layer:
            lines.append(f"experts     {' '.join(map(str, self.experts_per_layer))} (per layer)")
        rows = [("tensor", "shape", "dtype", "count", "bytes")]
        rows += [
            (name, "x".join(map(str, shape)) or "scalar", dtype, f"x{len(infos)}", f"{sum(i.nbytes for i in infos):,}")
            for (name, shape, dtype), infos in grouped(self.tensors).items()
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        for row in rows:
            cells = [
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells))
        return lines


def inspect_checkpoint(path: Path) -> Inventory:
    """What lies in a run, in one of its checkpoints, in a folder of Hugging Face, or in what another program wrote.

    Raises:
        UserError: it is none of them, or damaged.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give a run, a checkpoint, or a Hugging Face folder")
    if any((path / "model").glob("mp_rank_*")):
        return _foreign(path, "PAI's GPT-MoE", open_pai(path))
    # Megatron-DeepSpeed writes both files.
    if (path / "latest").is_file():
        return _foreign(path, "checkpoint of Megatron-DeepSpeed", open_deepspeed(path))
    if (path / LATEST_FILE).is_file():
        return _ours(find_checkpoint(path))
    if (path / METADATA_FILE).is_file():
        return _ours(path)
    if path.suffix == ".safetensors" or (path / "config.json").is_file() or any(path.glob("*.safetensors*")):
        return _hugging_face(path)
    raise UserError(
        f"{path}: holds no checkpoint that is known here (no {LATEST_FILE}, no {METADATA_FILE}, no safetensors file)"
    )


def grouped(tensors: Mapping[str, TensorInfo]) -> dict[tuple[str, tuple[int, ...], str], list[TensorInfo]]:
    """Tensors by name with `*` for numbers, shape and type."""
    groups: dict[tuple[str, tuple[int, ...], str], list[TensorInfo]] = {}
    for name, info in tensors.items():
        groups.setdefault((_NUMBER.sub("*", name), info.shape, dtype_name(info)), []).append(info)
    return groups


def experts_per_layer(tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """Experts of every layer, read off the tensors' names and shapes; empty where no layer has any."""
    counts: Counter[int] = Counter()
    layers = 0
    for name, info in tensors.items():
        layer = _LAYER.search(name)
        if layer is None:
            continue
        number = int(layer[1])
        layers = max(layers, number + 1)
        if one := _ONE_EXPERT.search(name):
            counts[number] = max(counts[number], int(one[1]) + 1)
        elif _STACKED.search(name) and len(info.shape) == 3:
            counts[number] = max(counts[number], info.shape[0])
    return tuple(counts[number] for number in range(layers)) if counts else ()


def parameters_of_dtype(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Numbers of each type, the most frequent first."""
    counts: Counter[str] = Counter()
    for info in tensors.values():
        counts[dtype_name(info)] += prod(info.shape)
    return dict(counts.most_common())


def dtype_name(info: TensorInfo) -> str:
    """`bfloat16`."""
    return str(info.dtype).removeprefix("torch.")


def _ours(folder: Path) -> Inventory:
    weights: dict[str, TensorInfo] = {}
    state: dict[str, TensorInfo] = {}
    for name, entry in read_metadata(folder).state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            target = state if name.startswith(_STATE_PREFIXES) else weights
            target[name] = TensorInfo(tuple(entry.size), entry.properties.dtype)
    counts, kind = experts_per_layer(weights), f"checkpoint of megatron-core, {folder.name}"
    if (folder / CONFIG_FILE).is_file():
        # Layers without experts may be stacked in the file, so that names do not tell.
        run = load_saved_run(folder / CONFIG_FILE)
        all_layers = expert_layout(run).experts_per_layer
        counts = all_layers if any(all_layers) else ()
        step = folder.name.removeprefix("iter_")
        if step.isdigit() and folder == checkpoint_folder(folder.parent, int(step)):
            kind = f"checkpoint of megatron_moe, step {int(step)}"
    return Inventory(folder, kind, weights, counts, _size(folder.iterdir()), state)


def _foreign(path: Path, kind: str, opened: ForeignModel) -> Inventory:
    infos = opened.source.infos
    counts = expert_layout(build_run(opened.sections)).experts_per_layer
    return Inventory(path, kind, infos, counts if any(counts) else (), _size(path.rglob("*")))


def _hugging_face(path: Path) -> Inventory:
    source = SafetensorsSource(path)
    kind = "safetensors file" if path.is_file() else "Hugging Face checkpoint"
    if path.is_dir() and (path / "config.json").is_file():
        config = read_config(path)
        names = config.get("architectures") or [config.get("model_type", "of no named class")]
        kind = f"{kind}, {', '.join(map(str, names))}"
    return Inventory(path, kind, source.infos, experts_per_layer(source.infos), _size(source.paths))


def read_config(folder: Path, flag: str = "--hf") -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{flag} {folder}: no such folder; give the folder of a Hugging Face checkpoint")
    if not path.is_file():
        raise UserError(f"{flag} {folder}: holds no config.json; give the folder of a Hugging Face checkpoint")
    return read_object(path)


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())
