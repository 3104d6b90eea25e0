"""Files of `torch.save` opened without unpickling them: every tensor as torch loads it, and nothing that runs."""

import argparse
import collections
import io
import os
import pickle
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.checkpoint.foreign.torch_file import StoredTensor, read_torch_file
from megatron_moe.checkpoint.safe_pickle import Record
from megatron_moe.config.base import UserError
from tests.helpers.attacks import Evil


def read_whole(stored: StoredTensor) -> torch.Tensor:
    return stored.read([0] * len(stored.shape), stored.shape, set())


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_box_of_any_tensor(data: Any) -> None:
    """Tensors that begin inside of a storage, are transposed or skip numbers; of every type that models have."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]))
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    base = (torch.randn([length + 2 for length in shape]) * 50).to(dtype)
    tensor = base[tuple(slice(data.draw(st.integers(0, 2)), None, data.draw(st.integers(1, 2))) for _ in shape)]
    tensor = tensor.permute(data.draw(st.permutations(range(tensor.dim()))))
    start = [data.draw(st.integers(0, length - 1)) for length in tensor.shape]
    size = [data.draw(st.integers(1, length - first)) for length, first in zip(tensor.shape, start, strict=True)]
    buffer = io.BytesIO()
    before = data.draw(st.integers(0, 99))
    torch.save({"a": [base, tensor]}, buffer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.pt")
        path.write_bytes(bytes(before) + buffer.getvalue() + b"more")
        whole, stored = read_torch_file(path, before, len(buffer.getvalue()))["a"]
        assert stored.storage == whole.storage
        box = tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))
        assert torch.equal(stored.read(start, size, set()), tensor[box])
        assert torch.equal(read_whole(stored), tensor)


def test_values_of_a_training_run(tmp_path: Path) -> None:
    """What training scripts save beside tensors becomes data."""
    path = tmp_path / "file.pt"
    weight = torch.nn.Parameter(torch.randn(3, 2))
    torch.save(
        {
            "model": collections.OrderedDict(weight=weight, scale=io.BytesIO(b"fp8"), empty=torch.empty(0, 4)),
            "args": argparse.Namespace(width=8, dtype=torch.bfloat16, names=["a", "b"], folder=Path("x")),
            "random": [np.random.RandomState(0).get_state(), torch.get_rng_state(), {"loss": np.float32(1.5)}],
            "seen": {3, 4},
        },
        path,
    )
    found = read_torch_file(path)
    assert torch.equal(read_whole(found["model"]["weight"]), weight.data)
    assert read_whole(found["model"]["empty"]).shape == (0, 4)
    assert str(found["model"]["scale"].made_by) == "_io.BytesIO"
    assert found["args"]["width"] == 8
    assert found["args"]["names"] == ["a", "b"]
    assert str(found["args"]["dtype"]) == "torch.bfloat16"
    assert isinstance(found["random"][2]["loss"], Record)
    assert torch.equal(read_whole(found["random"][1]), torch.get_rng_state())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": torch.arange(6), "args": argparse.Namespace(n=1)}, path, pickle_protocol=protocol)
    found = read_torch_file(path)
    assert torch.equal(read_whole(found["a"]), torch.arange(6))
    assert found["args"] == {"n": 1}


@pytest.mark.parametrize("function", [os.mkdir, eval, exec, getattr, __import__, torch.load, torch.save])
def test_nothing_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2), "b": Evil(function, "harm-done")}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=rf"refers to '.*{function.__name__}'"):
        read_torch_file(tmp_path / "file.pt")
    assert not (tmp_path / "harm-done").exists()


def test_program_classes_are_not_imported(tmp_path: Path) -> None:
    """Classes of megatron and deepspeed are records, whatever is called with whatever arguments."""
    content = b"\x80\x02cmegatron.core.utils\nrun_anything\n(X\x03\x00\x00\x00abctR."
    rewrite(tmp_path / "file.pt", {"data.pkl": content})
    found = read_torch_file(tmp_path / "file.pt")
    assert isinstance(found, Record)
    assert found.args == ("abc",)


def rewrite(path: Path, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """A file of two tensors with other entries."""
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4), "b": torch.zeros(3)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, changes.get(name.rpartition("/")[2], old.read(name)))


def tensor_pickle(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """The pickle of a tensor in the first storage that announces any shape."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if isinstance(obj, Storage) else None

    class Tensor:
        def __reduce__(self) -> Any:
            hooks: dict[str, int] = collections.OrderedDict()
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, stride, False, hooks)

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Tensor()})
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("shape", "stride", "offset"),
    [
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2,), (4,), 0),
        ((10**12,), (0,), 0),
        ((10**6, 10**6), (0, 0), 0),
        ((2,), (-1,), 3),
        ((2, 2), (1,), 0),
    ],
)
def test_shapes_that_the_file_does_not_hold(
    tmp_path: Path, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    rewrite(tmp_path / "file.pt", {"data.pkl": tensor_pickle((2, 2), (2, 1))})
    assert read_torch_file(tmp_path / "file.pt")["a"].shape == (2, 2)
    rewrite(tmp_path / "file.pt", {"data.pkl": tensor_pickle(shape, stride, offset)})
    with pytest.raises(UserError, match=r"file.pt: damaged"):
        read_torch_file(tmp_path / "file.pt")


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    rewrite(path, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match="holds compressed data"):
        read_torch_file(path)
    rewrite(path, {"byteorder": b"big"})
    with pytest.raises(UserError, match="big-endian"):
        read_torch_file(path)
    rewrite(path, {"data.pkl": b"\x80\x02."})
    with pytest.raises(UserError, match=r"file.pt: damaged"):
        read_torch_file(path)
    path.write_bytes(b"PK\x03\x04" + struct.pack("<20x"))
    with pytest.raises(UserError, match=r"cut short, or not a file of torch.save"):
        read_torch_file(path)
    with pytest.raises(UserError, match=r"nothing.pt: cannot be read: No such file"):
        read_torch_file(tmp_path / "nothing.pt")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "text")
    with pytest.raises(UserError, match=r"no data.pkl in it"):
        read_torch_file(path)
