"""Safetensors folders: read by boxes as the library reads them whole, written so that the library reads them, and every
way to be damaged is one line."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_moe.checkpoint.convert.blocks import Box, whole
from megatron_moe.checkpoint.convert.ranges import interleave
from megatron_moe.checkpoint.convert.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsSource,
    SafetensorsWriter,
    read_header,
)
from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.config.base import UserError

TENSORS = {
    "b.bias": torch.randn(7),
    "a.weight": torch.randn(5, 8, 3).bfloat16(),
    "table": torch.arange(24).reshape(4, 6),
    "half": torch.randn(3, 2).half(),
    "one": torch.tensor(2.5),
    "flags": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 4),
}


def write(folder: Path, tensors: dict[str, torch.Tensor] = TENSORS, shard_bytes: int = 10**9) -> SafetensorsWriter:
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    writer = SafetensorsWriter(folder, infos, shard_bytes)
    writer.prepare()
    for piece in writer.pieces:
        writer.write(piece, tensors[piece.name][piece.slices].contiguous())
    writer.finish()
    return writer


def read_by_library(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    write(tmp_path)
    assert_same(read_by_library(tmp_path), TENSORS)
    assert not (tmp_path / INDEX_FILE).exists()
    with (tmp_path / SINGLE_FILE).open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        assert json.loads(stream.read(length))["__metadata__"] == {"format": "pt"}


def test_shards_have_an_index_of_what_is_in_them(tmp_path: Path) -> None:
    writer = write(tmp_path, shard_bytes=250)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) == 3
    assert shards[0] == "model-00001-of-00003.safetensors"
    assert writer.total_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / shard)
    assert_same(read_by_library(tmp_path), TENSORS)
    source = SafetensorsSource(tmp_path)
    assert_same({name: source.read(whole(name, info.shape)) for name, info in source.infos.items()}, TENSORS)


def test_boxes_are_read_as_slices(tmp_path: Path) -> None:
    tensor = torch.randn(6, 5, 700)
    save_file({"x": tensor, "wide": torch.randn(4, 40_000)}, tmp_path / SINGLE_FILE)
    source = pickle.loads(pickle.dumps(SafetensorsSource(tmp_path)))
    for start, size in [
        ((0, 0, 0), (6, 5, 700)),
        ((2, 0, 0), (3, 5, 700)),
        ((1, 2, 0), (4, 2, 700)),
        ((5, 4, 699), (1, 1, 1)),
        ((0, 1, 13), (6, 4, 20)),
        ((0, 1, 13), (6, 4, 680)),
        ((0, 1, 13), (6, 4, 200)),
        ((0, 1, 500), (6, 4, 200)),
        ((0, 0, 13), (2, 5, 1)),
        ((3, 1, 0), (0, 4, 700)),
    ]:
        box = Box("x", start, size)
        assert torch.equal(source.read(box), tensor[box.slices])
    wide = load_file(tmp_path / SINGLE_FILE)["wide"]
    assert torch.equal(source.read(Box("wide", (1, 5), (3, 20_000))), wide[1:, 5:20_005])


def test_a_large_tensor_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_moe.checkpoint.convert.safetensors_files.PIECE_BYTES", 64)
    tensors = {"x": torch.randn(9, 3, 5), "y": torch.randn(100)}
    writer = write(tmp_path, tensors)
    assert len(writer.pieces) == 9 + 7
    assert_same(read_by_library(tmp_path), tensors)


def test_pieces_of_all_files_come_in_turns() -> None:
    assert interleave([["a", "b", "c", "d"], ["1", "2"]]) == ["a", "1", "b", "c", "2", "d"]


def _cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def _edit_header(path: Path, change: Callable[[str], str]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _edit_index(path: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), "is missing"),
        (lambda folder: _cut(folder / "model-00001-of-00003.safetensors", -3), "cut short"),
        (lambda folder: _cut(folder / "model-00001-of-00003.safetensors", 4), "cut short"),
        (lambda folder: _cut(folder / "model-00001-of-00003.safetensors", 50), "announce a description"),
        (lambda folder: (folder / "model-00001-of-00003.safetensors").write_bytes(b"\xff" * 500), "announce"),
        (lambda folder: _edit_header(folder / "model-00001-of-00003.safetensors", lambda t: t[:-20]), "not JSON"),
        (
            lambda folder: _edit_header(
                folder / "model-00002-of-00003.safetensors", lambda t: t.replace('"BF16"', '"FP3"')
            ),
            "of type FP3",
        ),
        (
            lambda folder: _edit_header(
                folder / "model-00002-of-00003.safetensors", lambda t: t.replace("[5,8,3]", "[5,8,4]")
            ),
            "a.weight takes 320 bytes",
        ),
        (lambda folder: _edit_index(folder / INDEX_FILE, lambda m: m.update(extra=m["one"])), "says that extra lies"),
        (lambda folder: _edit_index(folder / INDEX_FILE, lambda m: m.pop("half")), "holds half, which"),
        (
            lambda folder: _edit_index(folder / INDEX_FILE, lambda m: m.update(half="../x.safetensors")),
            "no safetensors",
        ),
        (
            lambda folder: _edit_index(folder / INDEX_FILE, lambda m: m.update(half="x" * 300 + ".safetensors")),
            "no safetensors",
        ),
        (lambda folder: (folder / INDEX_FILE).write_bytes(b" " * 100_000_001), "is larger than 100,000,000 bytes"),
        (
            lambda folder: _edit_header(
                folder / "model-00002-of-00003.safetensors",
                lambda t: t.replace("[5,8,3]", f"[{','.join(['1'] * 17)}]"),
            ),
            "a.weight has 17 axes",
        ),
        (
            lambda folder: _edit_header(
                folder / "model-00002-of-00003.safetensors", lambda t: t.replace("[5,8,3]", f"[{2**49},0]")
            ),
            "axes of up to 562949953421312",
        ),
        (lambda folder: (folder / INDEX_FILE).write_text("{"), "not JSON"),
        (lambda folder: (folder / INDEX_FILE).write_text("[]"), "no weight_map"),
        (lambda folder: (folder / INDEX_FILE).unlink(), f"{INDEX_FILE} is not"),
        (lambda folder: save_file(TENSORS, folder / SINGLE_FILE), "holds both"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path, shard_bytes=250)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        SafetensorsSource(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2), "y": torch.zeros(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"x": torch.zeros(2), "z": torch.zeros(1)}, tmp_path / "model-00002-of-00002.safetensors")
    names = {"y": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    names["z"] = names["x"]
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="hold"):
        SafetensorsSource(tmp_path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    header = (
        b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    )
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + b"1")
    with pytest.raises(UserError, match="holds x twice"):
        SafetensorsSource(tmp_path)


def test_tensors_that_overlap_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.zeros(4), "y": torch.zeros(4)})
    _edit_header(tmp_path / SINGLE_FILE, lambda text: text.replace("[16,32]", "[8,24]"))
    with pytest.raises(UserError, match="y begins at byte 8"):
        read_header(tmp_path / SINGLE_FILE)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.zeros(1000)})
    source = SafetensorsSource(tmp_path)
    _cut(tmp_path / SINGLE_FILE, 900)
    with pytest.raises(UserError, match="cut short"):
        source.read(whole("x", (1000,)))


def test_an_empty_folder_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no safetensors file"):
        SafetensorsSource(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        SafetensorsSource(tmp_path / "absent")
