"""Our checkpoints are read part by part as they are read whole, whatever layout wrote them."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Box, whole
from megatron_moe.checkpoint.convert.ours_reader import OursSource
from megatron_moe.checkpoint.torch_metadata import read_metadata
from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig
from tests.helpers.converted import dense_run, moe_run, plain_tensors, save_weights
from tests.helpers.distributed import run_ranks

LAYOUTS: dict[str, tuple[int, Callable[[], RunConfig]]] = {
    "pyramid": (1, lambda: moe_run(bf16=True)),
    "pyramid over ranks": (
        4,
        lambda: moe_run(tensor_model_parallel_size=2, sequence_parallel=True, expert_model_parallel_size=2),
    ),
    "dense": (1, dense_run),
    "dense over stages": (2, lambda: dense_run(pipeline_model_parallel_size=2)),
    "dense over ranks": (2, lambda: dense_run(tensor_model_parallel_size=2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_those_of_the_whole(layout: str, tmp_path: Path) -> None:
    ranks, make = LAYOUTS[layout]
    run_ranks(ranks, save_weights, make(), tmp_path)
    expected: dict[str, Tensor] = run_ranks(1, plain_tensors, tmp_path)[0]
    source = pickle.loads(pickle.dumps(OursSource(tmp_path)))
    assert len(source.infos) > 20
    seen = set()
    for name, info in source.infos.items():
        key, tensor = name, expected.get(name)
        if tensor is None:
            layer, _, rest = name.removeprefix("decoder.layers.").partition(".")
            key, tensor = f"decoder.layers.{rest}", expected[f"decoder.layers.{rest}"][int(layer)]
        seen.add(key)
        assert tensor.dtype == info.dtype
        assert torch.equal(source.read(whole(name, info.shape)), tensor)
        start = tuple(length // 3 for length in info.shape)
        size = tuple(-(-length // 2) for length in info.shape)
        box = Box(name, start, size)
        assert torch.equal(source.read(box), tensor[box.slices])
    assert seen == expected.keys()


def save_fused(run: RunConfig, folder: Path) -> None:
    """On a rank: save with the names that Transformer Engine gives norms, which it keeps with the layer behind them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_moe.checkpoint import state

    plain = state.model_state

    def fused(model: list[Any]) -> dict[str, Any]:
        found = plain(model)
        keys = {entry.key for entry in nested_values(found) if hasattr(entry, "key")}
        for entry in nested_values(found):
            layer, norm, end = getattr(entry, "key", "").rpartition("input_layernorm.")
            if norm:
                entry.key = f"{layer}self_attention.linear_qkv.layer_norm_{end}"
            layer, norm, end = getattr(entry, "key", "").rpartition("pre_mlp_layernorm.")
            if norm and f"{layer}mlp.linear_fc1.weight" in keys:
                entry.key = f"{layer}mlp.linear_fc1.layer_norm_{end}"
        return found

    state.model_state = fused
    save_weights(run, folder)


# Weights and biases of four layers, two of which have a dense MLP; weights of stacked layers.
@pytest.mark.parametrize(("layout", "fused"), [("pyramid", 2 * (4 + 2)), ("dense", 2)])
def test_norms_have_one_name_whichever_implementation_wrote_them(layout: str, fused: int, tmp_path: Path) -> None:
    run = LAYOUTS[layout][1]()
    run_ranks(1, save_weights, run, tmp_path / "plain")
    run_ranks(1, save_fused, run, tmp_path / "fused")
    stored = read_metadata(tmp_path / "fused").state_dict_metadata
    assert len([key for key in stored if "layer_norm_" in key]) == fused
    plain = OursSource(tmp_path / "plain")
    source = pickle.loads(pickle.dumps(OursSource(tmp_path / "fused")))
    assert source.infos == plain.infos
    for name, info in plain.infos.items():
        assert torch.equal(source.read(whole(name, info.shape)), plain.read(whole(name, info.shape))), name


def save_both(run: RunConfig, folder: Path) -> None:
    """On a rank: save a norm by both names."""
    import copy

    from megatron_moe.checkpoint import state

    plain = state.model_state

    def both(model: list[Any]) -> dict[str, Any]:
        found = plain(model)
        (name,) = (name for name in found["model0"] if name.endswith("layers.0.input_layernorm.weight"))
        again = copy.copy(found["model0"][name])
        again.key = again.key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        found["model0"]["again"] = again
        return found

    state.model_state = both
    save_weights(run, folder)


def test_a_norm_by_both_names_is_refused(tmp_path: Path) -> None:
    run_ranks(1, save_both, moe_run(), tmp_path)
    with pytest.raises(UserError, match=r"holds decoder.layers.0.input_layernorm.weight twice, fused"):
        OursSource(tmp_path)


def _flip(folder: Path, key: str, within: int) -> None:
    """Change a bit of a number of the first part of a tensor."""
    metadata = read_metadata(folder)
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == key)
    path = folder / place.relative_path
    data = bytearray(path.read_bytes())
    # Behind headers and pickle of the archive, in its numbers.
    data[place.offset + within] ^= 1
    path.write_bytes(data)


def test_damage_is_found_wherever_it_is(tmp_path: Path) -> None:
    run_ranks(1, save_weights, dense_run(), tmp_path)
    key, name = "decoder.layers.mlp.linear_fc2.weight", "decoder.layers.0.mlp.linear_fc2.weight"
    OursSource(tmp_path).read(whole(name, (32, 64)))
    _flip(tmp_path, key, 4000)
    with pytest.raises(UserError, match="checksum") as caught:
        OursSource(tmp_path).read(whole(name, (32, 64)))
    assert str(tmp_path) in str(caught.value)
    # A part that is sound itself is not taken from a damaged whole.
    with pytest.raises(UserError, match="checksum"):
        OursSource(tmp_path).read(Box(name, (31, 0), (1, 64)))


def test_a_missing_or_short_file_is_named(tmp_path: Path) -> None:
    run_ranks(1, save_weights, dense_run(), tmp_path)
    path = next(tmp_path.glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match="cut short"):
        OursSource(tmp_path)
    run_ranks(1, save_weights, dense_run(), tmp_path / "other")
    path = next((tmp_path / "other").glob("*.distcp"))
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        OursSource(tmp_path / "other")
