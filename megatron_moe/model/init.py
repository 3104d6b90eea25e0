"""Initial weights that depend on the seed alone: every parallel layout starts from the same model.

Each tensor is drawn whole from a generator seeded by (seed, its name in the checkpoint), and every rank keeps its
slice, which the sharded state dict describes. Pipeline stages, tensor, expert and data ranks thus agree without
talking, on any device. (megatron-core draws on each rank from a state that depends on the layout, and
Megatron-LM #5844 shows what happens when experts are left out of it.)
"""

import hashlib
import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

# A routing embedding (`moe/routing_embedding.py`): its gates see rows as large as a normalised hidden state.
ROUTING_TABLE = "table"
# The expert residual network (`moe/expert_residual.py`) starts as the identity.
IDENTITY_AT_START = (".expert_residual.", "linear_fc2.weight")
OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_weights(model: torch.nn.Module, *, seed: int, std: float, num_layers: int) -> None:
    """Fill every parameter of one model chunk in place; buffers stay as they were built.

    Matrices and embeddings are normal with `std`; matrices that write into the residual stream with
    std / sqrt(2 * num_layers) (GPT-2, Megatron-LM); norm weights are 1, biases and the second matrices of
    the expert residual network 0; a routing embedding is normal with 1.

    Args:
        model: a bare `GPTModel` chunk (not wrapped for data parallelism).
        seed: of the run.
        std: `--init-method-std`.
        num_layers: of the whole model.

    Raises:
        RuntimeError: a parameter is not covered by the sharded state dict.
    """
    covered: set[int] = set()
    buffers = {buffer.data_ptr() for buffer in model.buffers()}
    for entry in _leaves(model.sharded_state_dict()):  # type: ignore[operator]
        if isinstance(entry, ShardedTensorFactory):
            # A gated fc1: its gate and up halves are stored apart; their shards are views of the parameter.
            covered.add(entry.data.data_ptr())
            for part in _leaves(entry.build()):
                _fill(part, seed, std, num_layers)
        elif isinstance(entry, ShardedTensor) and entry.data is not None and entry.data.is_floating_point():
            if entry.data.data_ptr() in buffers:
                continue
            covered.add(entry.data.data_ptr())
            _fill(entry, seed, std, num_layers)
    for name, parameter in model.named_parameters():
        if parameter.data_ptr() not in covered:
            raise RuntimeError(f"parameter {name} has no entry in the sharded state dict: it would stay uninitialised")


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in _leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in _leaves(value)]
    return [tree]


def _fill(shard: ShardedTensor, seed: int, std: float, num_layers: int) -> None:
    data, kind = shard.data, shard.key.rsplit(".", 1)[-1]
    if kind.endswith("bias") or all(part in shard.key for part in IDENTITY_AT_START):
        data.zero_()
    elif "norm" in shard.key:
        data.fill_(1.0)
    elif kind == ROUTING_TABLE:
        data.copy_(_draw(shard, seed))
    else:
        output = shard.key.endswith(OUTPUT_PROJECTIONS)
        data.copy_(_draw(shard, seed) * (std / math.sqrt(2 * num_layers) if output else std))


def _draw(shard: ShardedTensor, seed: int) -> torch.Tensor:
    """This rank's slice of the whole tensor's standard normal values, on the CPU in fp32.

    The leading, prepended axes (an expert's index) select a tensor of its own, so no more than one matrix is ever
    drawn at a time.
    """
    prepended = shard.prepend_axis_num
    index = shard.global_offset[:prepended]
    digest = hashlib.sha256(f"{seed}/{shard.key}/{tuple(index)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.randn(tuple(shard.global_shape[prepended:]), generator=generator)
    slices = tuple(
        slice(start, start + size)
        for start, size in zip(shard.global_offset[prepended:], shard.local_shape, strict=True)
    )
    return whole[slices]
