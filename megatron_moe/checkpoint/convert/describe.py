"""What a checkpoint of ours holds of a model, read off the model itself.

It is built on the meta device and asked for its sharded state, so there is no second list of names.

Names: a checkpoint of a model without experts stacks its layers, `decoder.layers.mlp.linear_fc2.weight` [layers, ...]
(`megatron/core/transformer/transformer_block.py:TransformerBlock.sharded_state_dict`, homogeneous layers); others have
the layer in the name. Outside of this module and those that read and write checkpoints, names always have the layer.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_moe.checkpoint.convert.blocks import Box
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.config.run import RunConfig

_STACKED = re.compile(r"(decoder\.layers\.)(?!\d)(.+)")
_IN_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")
_LAYER = re.compile(r"decoder\.layers\.(?:\d+\.)?")
# Norms that are part of the linear layer behind them, and the names of those that are not.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass
class CheckpointTensor:
    """A tensor as a checkpoint names it, and the boxes in which a run of one process would store it."""

    info: TensorInfo
    chunks: list[Box] = field(default_factory=list)


@dataclass
class CheckpointModel:
    """All that loading a model asks a checkpoint for."""

    tensors: dict[str, CheckpointTensor]
    objects: list[str]
    """Keys of the empty states of linear layers."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """The tensors by the names that have the layer in them."""
        return {name: info for key, stored in self.tensors.items() for name, info in unstacked(key, stored.info)}


def our_tensors(run: RunConfig) -> dict[str, TensorInfo]:
    """Names, whole shapes and dtypes of a run's weights and buffers, in the order of the model.

    Starts and stops process groups of its own; call it before any others are started.

    Raises:
        ConfigError: --vocab-size is not known.
    """
    return describe(run).infos


def describe(run: RunConfig) -> CheckpointModel:
    """`our_tensors` as they are stored.

    Raises:
        ConfigError: --vocab-size is not known.
    """
    from megatron.core.transformer.module import Float16Module

    from megatron_moe.checkpoint.state import model_state
    from megatron_moe.model.meta import model_on_meta

    with model_on_meta(run) as model:
        if run.training.precision != "fp32":
            # What becomes of the dtypes is upstream's to say: a router's bias stays fp32.
            model = Float16Module(model.config, model)
        return describe_state(model_state([model]))


def describe_state(state: dict[str, Any]) -> CheckpointModel:
    """What a sharded state holds; of one process, so everything."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    tensors: dict[str, CheckpointTensor] = {}
    objects: list[str] = []
    for entry in _entries(state):
        if isinstance(entry, ShardedObject):
            if entry.data is not None:
                raise TypeError(
                    f"{entry.key}: holds a {type(entry.data).__name__}, and a converter knows nothing to put there"
                )
            objects.append(entry.unique_key)
        elif isinstance(entry, ShardedTensor):
            info = TensorInfo(tuple(entry.global_shape), entry.dtype)
            stored = tensors.setdefault(entry.key, CheckpointTensor(info))
            size = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
            chunk = Box(entry.key, tuple(entry.global_offset), size)
            if chunk not in stored.chunks:
                stored.chunks.append(chunk)
        else:
            raise TypeError(f"a sharded state holds a {type(entry).__name__}")
    return CheckpointModel(tensors, sorted(set(objects)))


def _entries(tree: Any) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _entries(value)
    elif isinstance(tree, ShardedTensorFactory):
        with torch.no_grad():
            yield from _entries(tree.build())
    else:
        yield tree


def plain_norm(name: str) -> str:
    """The name that a layer's tensor has with --transformer-impl local: Transformer Engine fuses norms with the linear
    layers behind them (`megatron/core/extensions/transformer_engine.py:TELayerNormColumnParallelLinear`)."""
    for fused, plain in _FUSED_NORMS.items():
        before, found, end = name.rpartition(fused)
        if found and (not before or _LAYER.fullmatch(before)):
            return f"{before}{plain}{end}"
    return name


def is_stacked(key: str) -> bool:
    """Whether a checkpoint's key stands for the tensors of all layers."""
    return _STACKED.fullmatch(key) is not None


def unstacked(key: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    """The tensors that a checkpoint's key stands for: one, or one for each layer."""
    match = _STACKED.fullmatch(key)
    if match is None:
        yield key, info
        return
    for layer in range(info.shape[0]):
        yield f"{match[1]}{layer}.{match[2]}", TensorInfo(info.shape[1:], info.dtype)


def unstack(box: Box) -> list[Box]:
    """A part of a stored tensor, as parts of the tensors it stands for, in order."""
    match = _STACKED.fullmatch(box.name)
    if match is None:
        return [box]
    layers = range(box.start[0], box.stop[0])
    return [Box(f"{match[1]}{layer}.{match[2]}", box.start[1:], box.size[1:]) for layer in layers]


def stack(box: Box) -> Box:
    """A part of a layer's tensor, as the part of the stacked tensor that it is."""
    match = _IN_LAYER.fullmatch(box.name)
    if match is None:
        return box
    return Box(match[1] + match[3], (int(match[2]), *box.start), (1, *box.size))
