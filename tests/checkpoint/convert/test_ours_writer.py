"""What the streaming writer writes is a checkpoint like any other: every layout loads it, bit for bit."""

import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.archive import archive_length, write_archive
from megatron_moe.checkpoint.convert.blocks import whole
from megatron_moe.checkpoint.convert.describe import describe
from megatron_moe.checkpoint.convert.ours_reader import OursSource
from megatron_moe.checkpoint.convert.ours_writer import FORMAT, OursWriter
from megatron_moe.checkpoint.convert.ranges import Files
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.layout import CONFIG_FILE, find_checkpoint
from megatron_moe.checkpoint.torch_metadata import FORMAT_FILE, LEGACY_COMMON_FILE
from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import save_run
from tests.helpers.converted import dense_run, moe_run, plain_tensors
from tests.helpers.distributed import RankFailure, run_ranks
from tests.helpers.models import Shard, assemble


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (1, 4, 7), (), (1000,)])
def test_torch_loads_an_archive(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = (torch.rand(shape) * 100).to(dtype)
    info = TensorInfo(shape, dtype)
    length = archive_length(info)
    path = tmp_path / "file"
    path.write_bytes(bytes(17 + length + 9))
    write_archive(Files(tmp_path, writable=True), "file", 17, info, values)
    content = path.read_bytes()
    assert content[:17] == bytes(17)
    assert content[17 + length :] == bytes(9)
    (tmp_path / "archive").write_bytes(content[17 : 17 + length])
    assert torch.equal(torch.load(tmp_path / "archive", weights_only=True), values)
    # Numbers begin at a multiple of 64, as torch wants them to be mapped.
    assert torch.equal(torch.load(tmp_path / "archive", weights_only=True, mmap=True), values)
    with zipfile.ZipFile(tmp_path / "archive") as archive:
        assert archive.testzip() is None


def write_random(run: RunConfig, folder: Path) -> dict[str, Tensor]:
    """On a rank: a checkpoint of random weights; returns them by the names that have the layer."""
    writer = OursWriter(folder, describe(run), "FOLDER")
    torch.manual_seed(1)
    tensors = {}
    for name, info in writer.infos.items():
        values = torch.randn(info.shape)
        tensors[name] = (values * 100).to(info.dtype) if info.dtype == torch.int64 else values.to(info.dtype)
    writer.prepare()
    assert writer.is_prepared
    for piece in writer.pieces:
        writer.write(piece, tensors[piece.name][piece.slices].contiguous())
    writer.finish()
    save_run(run, writer.folder / CONFIG_FILE)
    return tensors


def load_shards(run: RunConfig, folder: Path) -> list[Shard]:
    """On a rank: load the weights as generation does; returns what the rank holds."""
    from megatron_moe.checkpoint.load import load_model
    from tests.helpers.models import shards, start_model

    model = start_model(run)
    load_model(model, find_checkpoint(folder))
    return shards(model)


RUNS = {"pyramid": moe_run, "dense": dense_run}


@pytest.mark.parametrize("kind", RUNS)
def test_a_checkpoint_is_what_was_written(kind: str, tmp_path: Path) -> None:
    written = run_ranks(1, write_in_small_parts, RUNS[kind](bf16=True), tmp_path)[0]
    assert len(list(tmp_path.rglob("*.distcp"))) > 1
    source = OursSource(find_checkpoint(tmp_path))
    assert source.infos.keys() == written.keys()
    for name, tensor in written.items():
        assert torch.equal(source.read(whole(name, tensor.shape)), tensor)
    # What megatron-core reads, which has the layers in a stack.
    for key, tensor in run_ranks(1, plain_tensors, find_checkpoint(tmp_path))[0].items():
        if key not in written:
            layers = [written[key.replace("layers.", f"layers.{layer}.")] for layer in range(len(tensor))]
            assert torch.equal(tensor, torch.stack(layers))
        else:
            assert torch.equal(tensor, written[key])


def write_in_small_parts(run: RunConfig, folder: Path) -> dict[str, Tensor]:
    """On a rank: `write_random`, with tensors cut and files several."""
    from megatron_moe.checkpoint.convert import ours_writer

    ours_writer.PIECE_BYTES, ours_writer._FILE_BYTES = 4096, 100_000
    return write_random(run, folder)


@pytest.mark.parametrize(
    ("kind", "ranks", "layout"),
    [
        ("pyramid", 1, {}),
        ("pyramid", 4, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}),
        ("pyramid", 2, {"pipeline_model_parallel_size": 2}),
        ("dense", 2, {"tensor_model_parallel_size": 2}),
        ("dense", 2, {"pipeline_model_parallel_size": 2}),
    ],
)
def test_every_layout_loads_it(kind: str, ranks: int, layout: dict[str, object], tmp_path: Path) -> None:
    written = run_ranks(1, write_random, RUNS[kind](), tmp_path)[0]
    loaded = assemble(run_ranks(ranks, load_shards, RUNS[kind](**layout), tmp_path))
    seen = set()
    for key, array in loaded.items():
        if key in written:
            assert torch.equal(torch.from_numpy(array), written[key])
            seen.add(key)
            continue
        for layer, part in enumerate(array):
            name = key.replace("decoder.layers.", f"decoder.layers.{layer}.")
            assert torch.equal(torch.from_numpy(part), written[name])
            seen.add(name)
    assert seen == written.keys()


def resume(run: RunConfig) -> None:
    """On a rank: go on from --load."""
    from megatron_moe.checkpoint.load import load_checkpoint
    from tests.helpers.models import start_model

    load_checkpoint(run, start_model(run), None, None)


def test_a_run_cannot_go_on_from_weights_alone(tmp_path: Path) -> None:
    run_ranks(1, write_random, moe_run(), tmp_path)
    run = moe_run(load=str(tmp_path))
    with pytest.raises(RankFailure, match=r"holds weights only, converted from FOLDER; give --finetune"):
        run_ranks(1, resume, run)


def test_damage_is_found(tmp_path: Path) -> None:
    run_ranks(1, write_random, dense_run(), tmp_path)
    path = next(tmp_path.rglob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    source = OursSource(find_checkpoint(tmp_path))
    with pytest.raises(UserError, match="damaged"):
        [source.read(whole(name, info.shape)) for name, info in source.infos.items()]


def test_upstream_calls_its_files_the_same() -> None:
    from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

    assert (FORMAT_FILE, LEGACY_COMMON_FILE) == (CONFIG_FNAME, COMMON_STATE_FNAME)
    strategy = TorchDistSaveShardedStrategy()
    assert asdict(CheckpointingConfig(strategy.backend, strategy.version)) == FORMAT


def test_reading_a_checkpoint_imports_no_megatron_core() -> None:
    """It takes seconds, in each process of a conversion."""
    program = "import sys; from megatron_moe.checkpoint.convert import ours_reader, ours_writer, stream; "
    program += "print(sorted(name for name in sys.modules if name.startswith('megatron.')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
