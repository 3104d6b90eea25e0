"""Our model and a class of transformers on the same weights: built, filled, converted through a family's blocks, saved
to disk, compared by their logits on real text.

Shape legend: B = sequences, S = tokens of each, V = vocabulary.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Block, Box, Side, whole
from megatron_moe.checkpoint.convert.coverage import check_coverage
from megatron_moe.checkpoint.convert.engine import Targets, assemble
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.hf.families.base import Family
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run
from tests.helpers.models import sharded_tensors
from tests.helpers.tiny import tiny_run

VOCABULARY = 259
"""Bytes and three more: our tables are padded, theirs are not."""
ROWS, LENGTH = 2, 48
TOLERANCE = 1e-4

# Small, and no two sizes alike, so that nothing fits by accident.
LLAMA_LIKE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 80,
    "seq_length": LENGTH,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": VOCABULARY,
    "num_experts": None,
    "expert_interval": 1,
    "mlp_type": "standard",
}
EXPERTS: dict[str, Any] = {"num_experts": (6,), "moe_router_topk": 2, "moe_ffn_hidden_size": 40}


def llama_like(**flags: Any) -> RunConfig:
    """A tiny dense decoder like Llama's, with some flags changed."""
    return tiny_run(**(LLAMA_LIKE | flags))


def moe_like(**flags: Any) -> RunConfig:
    """The same with experts in every layer: post-softmax top-2 of 6."""
    return llama_like(**(EXPERTS | flags))


@contextmanager
def one_process() -> Iterator[None]:
    """Process groups of this process alone, as models of ours need them."""
    from megatron_moe.config.parallel import ParallelConfig
    from megatron_moe.runtime.distributed import start, stop
    from megatron_moe.runtime.seeds import set_seeds

    start(ParallelConfig(device="cpu"), trains=False)
    # megatron-core's own attention asks for its generators, dropout or not.
    set_seeds(0)
    try:
        yield
    finally:
        stop()


@cache
def real_ids() -> Tensor:
    """[B, S] bytes of Python's own language reference, as token ids."""
    text = "".join(topics[name] for name in sorted(topics)).encode()
    rows = [text[number * 5000 : number * 5000 + LENGTH] for number in range(ROWS)]
    return torch.tensor([list(row) for row in rows])


# ---- our side


@dataclass
class Ours:
    """A model of ours in this process, built for inference."""

    run: RunConfig
    chunk: Any = field(init=False)

    def __post_init__(self) -> None:
        from megatron_moe.config.validate import validate
        from megatron_moe.model.gpt import build_model

        validate(self.run, 1)
        self.chunk = build_model(self.run, inference=True)[0].eval()

    def randomise(self, seed: int = 0) -> "Ours":
        """Every weight at random: norms are not 1, biases not 0, or mistakes with them stay unseen."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, tensor in [*self.chunk.named_parameters(), *self.chunk.named_buffers()]:
                if not tensor.is_floating_point() or "load_counters" in name or "margin_beta" in name:
                    continue
                noise = torch.randn(tensor.shape, generator=generator)
                if tensor.ndim == 1:
                    tensor.copy_(0.3 * noise + (1.0 if name.endswith("norm.weight") else 0.0))
                else:
                    # Larger than at the start of training, so that tokens differ and experts are chosen clearly.
                    tensor.copy_(1.5 * noise / tensor.shape[-1] ** 0.5)
        return self

    def _parts(self) -> Iterator[tuple[str, tuple[int, ...], tuple[slice, ...], Tensor]]:
        """Every part of a tensor: canonical name, whole shape, place, the values themselves."""
        for entry in sharded_tensors([self.chunk]):
            key, shape, offset = entry.key, tuple(entry.global_shape), tuple(entry.global_offset)
            front = entry.prepend_axis_num
            size = (1,) * front + tuple(entry.local_shape)
            if front and ".layers." in key and not key.split(".layers.")[1][0].isdigit():
                # A dense model's checkpoint stacks its layers; names count them.
                key = key.replace(".layers.", f".layers.{offset[0]}.")
                shape, offset, size = shape[1:], offset[1:], size[1:]
            place = tuple(slice(begin, begin + length) for begin, length in zip(offset, size, strict=True))
            yield key, shape, place, entry.data.view(size)

    @torch.no_grad()
    def tensors(self) -> dict[str, Tensor]:
        """Copies of the whole tensors by their canonical names."""
        found: dict[str, Tensor] = {}
        for key, shape, place, values in self._parts():
            found.setdefault(key, torch.full(shape, float("nan"), dtype=values.dtype))[place] = values
        assert not any(tensor.isnan().any() for tensor in found.values())
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> "Ours":
        """Take over all weights."""
        seen = set()
        for key, shape, place, values in self._parts():
            assert tuple(tensors[key].shape) == shape, key
            values.copy_(tensors[key][place])
            seen.add(key)
        assert seen == set(tensors), f"not taken: {sorted(set(tensors) - seen)}"
        return self

    @torch.no_grad()
    def logits(self, ids_BS: Tensor | None = None) -> Tensor:
        """[B, S, V] without the rows that only pad the tables."""
        from megatron_moe.moe.inputs import pack_inputs

        ids_BS = real_ids() if ids_BS is None else ids_BS
        positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        inputs = pack_inputs(ids_BS, torch.arange(len(ids_BS)))
        output = self.chunk(ids_BS, positions_BS, None, padding_mask=inputs, runtime_gather_output=True)
        return output[..., : self.run.model.vocab_size].float()


# ---- between the sides


class MemorySource:
    """Tensors in memory as a `TensorSource`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}

    def read(self, box: Box) -> Tensor:
        """A part of a tensor."""
        return self.tensors[box.name][box.slices].clone()


def convert(blocks: list[Block], side: Side, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of `side`, from those of the other; every number of both sides must be in one block exactly.

    Plain and slow on purpose: `checkpoint/convert` must come to the same, and does.
    """
    other: Side = "theirs" if side == "ours" else "ours"
    shapes: dict[str, list[int]] = {}
    for box in filter(None, (block.side(side) for block in blocks)):
        shape = shapes.setdefault(box.name, [0] * len(box.size))
        shapes[box.name] = [max(pair) for pair in zip(shape, box.stop, strict=True)]
    made = {name: torch.zeros(shape) for name, shape in shapes.items()}
    times = {name: torch.zeros(shape, dtype=torch.int) for name, shape in shapes.items()}
    read = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in source.items()}
    for block in blocks:
        target, origin = block.side(side), block.side(other)
        if origin is not None:
            read[origin.name][origin.slices] += 1
        if target is None:
            continue
        times[target.name][target.slices] += 1
        if origin is None:
            made[target.name][target.slices] = block.fill
            continue
        values = source[origin.name][origin.slices]
        values = values.transpose(-1, -2) if block.transposed else values
        factor = block.scale if side == "theirs" else 1.0 / block.scale
        made[target.name][target.slices] = factor * values.reshape(target.size)
    for name, count in [*times.items(), *read.items()]:
        assert (count == 1).all(), f"{name}: {int((count != 1).sum())} of {count.numel()} numbers not in one block"
    sides = (made, source) if side == "ours" else (source, made)
    check_coverage(blocks, *({name: tensor.shape for name, tensor in tensors.items()} for tensors in sides))
    targets, memory = Targets(blocks, side), MemorySource(source)
    for name, tensor in made.items():
        assert torch.equal(assemble(targets, whole(name, tensor.shape), memory, tensor.dtype), tensor), name
    return made


# ---- their side


def save_theirs(family: Family, run: RunConfig, tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """A folder as `to-hf` would write it: config.json and the weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    config = {"architectures": [family.architecture], "model_type": family.model_type, **family.config(run)}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def load_theirs(folder: Path) -> Any:
    """The folder's model in fp32, with nothing missing, unexpected or of another shape."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {name: found for name, found in info.items() if found}
    assert not wrong, wrong
    return model.eval()


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of theirs."""
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@torch.no_grad()
def their_logits(model: Any, ids_BS: Tensor | None = None) -> Tensor:
    """[B, S, V]."""
    return model(real_ids() if ids_BS is None else ids_BS).logits.float()


def randomise_theirs(model: Any, seed: int = 1) -> Any:
    """As `Ours.randomise`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                tensor.copy_(1.5 * noise / tensor.shape[-1] ** 0.5)
    return model


# ---- whole comparisons


@dataclass
class Exported:
    """A model of ours, and what a class of transformers makes of it."""

    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]
    folder: Path
    difference: float
    """Largest between the logits."""
    size: float
    """The largest logit."""


def exported_alike(family: Family, run: RunConfig, folder: Path) -> Exported:
    """`export` of a model that the class holds exactly: logits that are far from zero differ by rounding alone."""
    assert family.why_not(run) is None
    result = export(family, run, folder)
    assert result.size > 1.0
    assert result.difference <= TOLERANCE
    return result


def export(family: Family, run: RunConfig, folder: Path, seed: int = 0) -> Exported:
    """Convert a random model of ours, load it from disk, and compare."""
    model = Ours(run).randomise(seed)
    ours, blocks = model.tensors(), family.blocks(run)
    theirs = convert(blocks, "theirs", ours)
    save_theirs(family, run, theirs, folder)
    expected, actual = model.logits(), their_logits(load_theirs(folder))
    return Exported(ours, theirs, folder, float((expected - actual).abs().max()), float(expected.abs().max()))


@dataclass
class Imported:
    """A model of theirs, and what ours makes of it."""

    run: RunConfig
    folder: Path
    keys: dict[str, tuple[int, ...]]
    """Shapes on disk."""
    difference: float
    """Largest between the logits."""
    size: float


def imported_alike(family: Family, config: Any, folder: Path) -> Imported:
    """`import_` of a model that ours is exactly."""
    result = import_(family, config, folder)
    assert result.size > 1.0
    assert result.difference <= TOLERANCE
    return result


def import_(family: Family, config: Any, folder: Path, seed: int = 1) -> Imported:
    """Save a random model of transformers with its own `save_pretrained`, read it, compare, and write it again, which
    must give the same bits.

    Args:
        family: of the class.
        config: of transformers, tiny.
        folder: where to save it.
        seed: of the weights.
    """
    from transformers import AutoModelForCausalLM

    model = randomise_theirs(AutoModelForCausalLM.from_config(config).float().eval(), seed)
    model.save_pretrained(folder)
    theirs = read_folder(folder)
    flags = family.flags(json.loads((folder / "config.json").read_text()))
    run = build_run(flags, {"parallel": {"device": "cpu"}, "training": {"train_iters": 1}})
    assert family.why_not(run) is None
    blocks = family.blocks(run)
    ours = convert(blocks, "ours", theirs)
    expected, actual = their_logits(load_theirs(folder)), Ours(run).load(ours).logits()
    again = convert(blocks, "theirs", ours)
    assert set(again) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, again[name]), name
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    return Imported(run, folder, shapes, float((expected - actual).abs().max()), float(expected.abs().max()))
