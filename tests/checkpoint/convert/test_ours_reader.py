"""Our checkpoints are read part by part as they are read whole, whatever layout wrote them."""

import pickle
from collections.abc import Callable
from pathlib import Path

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
