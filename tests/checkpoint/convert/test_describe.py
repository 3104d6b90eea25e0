"""What a model is said to store is what a run of it stores."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_moe.checkpoint.convert.blocks import Box
from megatron_moe.checkpoint.convert.describe import describe, our_tensors, stack, unstack
from megatron_moe.checkpoint.torch_metadata import read_metadata
from megatron_moe.config.run import RunConfig
from tests.helpers.converted import dense_run, moe_run, save_weights
from tests.helpers.distributed import run_ranks

RUNS: dict[str, Callable[[], RunConfig]] = {
    "pyramid": moe_run,
    "dense": dense_run,
    "half precision": lambda: moe_run(
        bf16=True,
        mlp_type="standard",
        moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid",
        moe_router_load_balancing_type="none",
    ),
    "fixed tables": lambda: moe_run(router="hash", fp16=True),
}


def _describe(run: RunConfig) -> object:
    return describe(run)


@pytest.mark.parametrize("kind", RUNS)
def test_a_model_is_described_as_it_is_saved(kind: str, tmp_path: Path) -> None:
    run = RUNS[kind]()
    run_ranks(1, save_weights, run, tmp_path)
    described = run_ranks(1, _describe, run)[0]
    stored = read_metadata(tmp_path).state_dict_metadata
    tensors = {key: entry for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    assert described.tensors.keys() == tensors.keys()
    for key, entry in tensors.items():
        assert described.tensors[key].info.shape == tuple(entry.size)
        assert described.tensors[key].info.dtype == entry.properties.dtype, key
        chunks = {(box.start, box.size) for box in described.tensors[key].chunks}
        assert chunks == {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks}
    objects = stored.keys() - tensors.keys() - {"common_state/shard_0_1"}
    assert set(described.objects) == objects


def test_layers_are_always_in_the_names() -> None:
    infos = run_ranks(1, our_tensors, dense_run())[0]
    assert infos["decoder.layers.3.mlp.linear_fc2.weight"].shape == (32, 64)
    assert infos["decoder.layers.0.self_attention.linear_qkv.weight"].shape == (64, 32)
    assert not any("layers.mlp" in name for name in infos)


def test_buffers_keep_their_types() -> None:
    infos = run_ranks(1, our_tensors, RUNS["half precision"]())[0]
    assert infos["decoder.layers.1.mlp.router.expert_bias"].dtype == torch.float32
    assert infos["decoder.layers.1.mlp.router.weight"].dtype == torch.bfloat16
    tables = run_ranks(1, our_tensors, RUNS["fixed tables"]())[0]
    assert not tables["decoder.layers.1.mlp.router.token_map"].dtype.is_floating_point


def test_boxes_move_between_layers_and_stacks() -> None:
    boxes = unstack(Box("decoder.layers.mlp.linear_fc2.weight", (1, 2, 3), (2, 4, 5)))
    assert boxes == [Box(f"decoder.layers.{layer}.mlp.linear_fc2.weight", (2, 3), (4, 5)) for layer in (1, 2)]
    assert stack(boxes[1]) == Box("decoder.layers.mlp.linear_fc2.weight", (2, 2, 3), (1, 4, 5))
    other = Box("decoder.final_layernorm.weight", (0,), (3,))
    assert unstack(other) == [other] == [stack(other)]
