"""Where the weights of a stock `GPTModel` of megatron-core are on our side: nearly always under the same name.

Norms may be with the linear layer that follows them (what Transformer Engine fuses), the halves of a SwiGLU together,
apart or on an axis of their own, experts stacked or one by one.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from megatron_moe.checkpoint.convert.blocks import Block, Box, cut_rows, only_theirs, place, whole
from megatron_moe.checkpoint.convert.describe import our_tensors, plain_norm
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig

WORDS, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
LEFT_OUT = re.compile(r".*(?:_extra_state.*|rotary_pos_emb\.inv_freq)")
FIRST = re.compile(r".*\.linear_fc1\.(?:weight|bias)")
# What may stand in a layer, by the name it has with us.
_IN_LAYER = re.compile(
    r"(?:input_layernorm|pre_mlp_layernorm|self_attention\.(?:linear_qkv|linear_proj|q_layernorm|k_layernorm)|"
    r"mlp\.(?:(?:experts\.experts\.|shared_experts\.)?linear_fc[12]))\.(?:weight|bias)|"
    r"mlp\.router\.(?:weight|expert_bias)|mlp\.shared_experts\.gate_weight"
)
# With biases in linear layers upstream's routers have one too (`transformer/moe/router.py:Router`); ours have none.
_ROUTER_BIAS = "mlp.router.bias"
# `singleton_local_shards` (megatron/core/transformer/mlp.py:apply_swiglu_sharded_factory).
_HALF = re.compile(r"(.*linear_fc1\.(?:weight|bias))_([wv])")
# As `SequentialMLP` and `TEGroupedMLP` name them in a plain state dict.
_EXPERTS = (
    re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<rest>linear_fc[12]\.(?:weight|bias))"),
    re.compile(r"mlp\.experts\.(?P<rest>linear_fc[12]\.(?:weight|bias))(?P<expert>\d+)"),
)
_OUTSIDE = re.compile(r"embedding\.position_embeddings\.weight|decoder\.final_layernorm\.(?:weight|bias)")


def check_model(run: RunConfig, infos: Mapping[str, TensorInfo], folder: Path) -> None:
    """Hold the flags against what can be seen at once.

    Raises:
        UserError: the number of layers, or the output layer, is another.
    """
    if WORDS not in infos:
        raise UserError(f"{folder}: holds no {WORDS}; is it a checkpoint of a GPTModel?")
    depth = len({match[1] for name in infos if (match := LAYER.fullmatch(name))})
    if depth != run.model.num_layers:
        raise UserError(f"{folder}: num_layers {run.model.num_layers}, but the weights are of {depth} layers")
    untied = run.model.untie_embeddings_and_output_weights
    if untied != (OUTPUT in infos):
        does = "lacks" if untied else "holds"
        raise UserError(f"{folder}: {does} {OUTPUT}, though untie_embeddings_and_output_weights is {untied}")


def check_complete(run: RunConfig, blocks: Iterable[Block], folder: Path) -> None:
    """Every tensor of ours must be made of something.

    Starts and stops process groups of its own.

    Raises:
        UserError: names the first that is not.
    """
    made = {block.ours.name for block in blocks if block.ours is not None}
    if missing := [name for name in our_tensors(run) if name not in made]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: holds nothing for {missing[0]}{more}, which its flags call for")


def megatron_blocks(
    run: RunConfig, infos: Mapping[str, TensorInfo], folder: Path, split: Collection[str] = ()
) -> list[Block]:
    """The whole model.

    Args:
        run: the model.
        infos: their tensors, layers in their names.
        folder: names the checkpoint in errors.
        split: first layers of a SwiGLU that are [2, F, ...].

    Raises:
        UserError: a tensor is none that our model has.
    """
    blocks = []
    for name, info in infos.items():
        match = LAYER.fullmatch(name)
        if name in (WORDS, OUTPUT):
            padded, rows = run.model.padded_vocab_size, info.shape[0]
            blocks += cut_rows(name, name, max(padded, rows), rows, info.shape[1:])
        elif match is not None:
            own = _in_layer(name, f"decoder.layers.{match[1]}.", match[2], info, folder)
            blocks += _halves(own) if name in split else own
        elif _OUTSIDE.fullmatch(name):
            blocks.append(Block(whole(name, info.shape), whole(name, info.shape)))
        else:
            raise _unknown(name, folder)
    return blocks


def _in_layer(name: str, layer: str, rest: str, info: TensorInfo, folder: Path) -> list[Block]:
    rest = plain_norm(rest)
    for pattern in _EXPERTS:
        if match := pattern.fullmatch(rest):
            ours = f"mlp.experts.experts.{match['rest']}"
            return place(_in_layer(name, layer, ours, info, folder), "ours", layer + ours, int(match["expert"]))
    if rest == _ROUTER_BIAS:
        return only_theirs(name, info.shape)
    half = _HALF.fullmatch(rest)
    ours = half[1] if half else rest
    if not _IN_LAYER.fullmatch(ours):
        raise _unknown(name, folder)
    ours, shape = layer + ours, info.shape
    if half:
        axis = int(".experts.experts." in ours)
        start = tuple(shape[axis] * (half[2] == "v") if place == axis else 0 for place in range(len(shape)))
        return [Block(Box(ours, start, shape), whole(name, shape))]
    return [Block(whole(ours, shape), whole(name, shape))]


def _halves(blocks: list[Block]) -> list[Block]:
    """[..., 2 * F, H] of ours, from [2, F, H]: the gate, then the value."""
    parts = []
    for block in blocks:
        assert block.ours is not None
        assert block.theirs is not None
        theirs, ours = block.theirs, block.ours
        # An expert's box has an axis of length 1 in front.
        lead, (_, length, *rest) = len(ours.size) - len(theirs.size), theirs.size
        for half in range(2):
            start = (*ours.start[:lead], half * length, *(0 for _ in rest))
            part = Box(ours.name, start, (*ours.size[:lead], length, *rest))
            parts.append(Block(part, Box(theirs.name, (half, 0, *(0 for _ in rest)), (1, length, *rest))))
    return parts


def _unknown(name: str, folder: Path) -> UserError:
    return UserError(f"{folder}: holds {name}, which is no part of a GPTModel that is read here")
