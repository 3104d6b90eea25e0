"""Any box of a tensor in a `torch.save` archive, read into any target, is what torch would have sliced."""

import io
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_moe.checkpoint import stored_tensor
from megatron_moe.checkpoint.safe_archive import FileSlice, load_archive
from megatron_moe.checkpoint.stored_tensor import (
    StoredTensor,
    check_remainder,
    check_whole,
    find_tensor,
    read_box,
)
from megatron_moe.config.base import UserError
from tests.helpers.fuzzing import check_message

AHEAD = b"another tensor's archive"


def write(path: Path, tensor: Any) -> None:
    """An archive in the middle of a file, as in a checkpoint's."""
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    path.write_bytes(AHEAD + buffer.getvalue() + b"and one behind")


def find(path: Path) -> StoredTensor | None:
    with path.open("rb") as stream:
        size = path.stat().st_size
        return find_tensor(FileSlice(stream, len(AHEAD), size - len(AHEAD) - len(b"and one behind")), "here")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    files = []

    def open_(tensor: torch.Tensor) -> tuple[int, StoredTensor]:
        path = tmp_path / "file"
        write(path, tensor)
        stored = find(path)
        assert stored is not None
        files.append(os.open(path, os.O_RDONLY))
        return files[-1], stored

    yield open_
    for file in files:
        os.close(file)


boxes = st.lists(
    st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(1, 6)).map(
        lambda drawn: (drawn[0], min(drawn[1], drawn[0] - 1), drawn[2])
    ),
    max_size=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(
    axes=boxes,
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.int64, torch.bool]),
    into=st.sampled_from(["itself", "contiguous", "strided", "turned", "another dtype"]),
    piece=st.sampled_from([1, 7, 64, 2**20]),
    buffer=st.sampled_from([1, 16, 2**22]),
)
def test_any_box_into_any_target(axes: Any, dtype: Any, into: str, piece: int, buffer: int, opened: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_tensor, "_PIECE", piece)
        patch.setattr(stored_tensor, "_BUFFER", buffer)
        read_and_compare(axes, dtype, into, opened)


def read_and_compare(axes: Any, dtype: torch.dtype, into: str, opened: Any) -> None:
    shape = tuple(length for length, _, _ in axes)
    start = tuple(begin for _, begin, _ in axes)
    size = tuple(min(wanted, length - begin) for length, begin, wanted in axes)
    tensor = (torch.arange(max(1, torch.Size(shape).numel())) % 100 - 50).reshape(shape).to(dtype)
    file, stored = opened(tensor)
    expected = tensor[tuple(slice(begin, begin + length) for begin, length in zip(start, size, strict=True))]
    target = torch.zeros(size, dtype=torch.float32 if into == "another dtype" else dtype)
    if into == "itself":
        target = torch.zeros(shape, dtype=dtype)
        target = target[tuple(slice(begin, begin + length) for begin, length in zip(start, size, strict=True))]
    elif into == "strided":
        target = torch.zeros(*size, 3, dtype=dtype)[..., 1]
    elif into == "turned":
        target = torch.zeros(size[::-1], dtype=dtype).permute(tuple(reversed(range(len(size)))))
    reading = read_box(file, stored, start, target)
    assert torch.equal(target, expected.to(target.dtype))
    assert reading.nbytes == expected.numel() * dtype.itemsize
    if size == shape:
        check_remainder(stored, reading.remainder)
    check_whole(file, stored)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_read_apart_have_the_checksum_of_the_whole(axis: int, dtype: torch.dtype, opened: Any) -> None:
    tensor = torch.randn(4, 6, 10)
    file, stored = opened(tensor)
    value = 0
    for begin in range(0, tensor.shape[axis], 2):
        target = torch.zeros_like(tensor.narrow(axis, begin, 2), dtype=dtype)
        start = [0, 0, 0]
        start[axis] = begin
        value ^= read_box(file, stored, start, target).remainder
    check_remainder(stored, value)
    with pytest.raises(UserError, match=r"here: damaged \(its checksum differs\)"):
        check_remainder(stored, value ^ 1)


def test_a_flipped_bit_is_found_and_a_file_cut_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, torch.randn(50, 50))
    stored = find(path)
    assert stored is not None
    content = bytearray(path.read_bytes())
    content[stored.begin + 777] ^= 4
    path.write_bytes(content)
    with path.open("rb") as stream:
        with pytest.raises(UserError, match="its checksum differs"):
            check_whole(stream.fileno(), stored)
        os.truncate(path, stored.begin + 5000)
        with pytest.raises(UserError, match="here: cut short while it was read"):
            read_box(stream.fileno(), stored, (0, 0), torch.zeros(50, 50))


@pytest.mark.parametrize(
    "unusual",
    [
        torch.randn(4, 6).t(),
        torch.randn(8)[2:],
        torch.randn(8)[::2],
        [torch.randn(3)],
        torch.zeros(0, 4),
        torch.zeros(4).to(torch.float8_e4m3fn),
        torch.zeros(2, dtype=torch.complex64),
        3,
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_what_is_stored_in_another_way_is_left_to_torch(unusual: Any, tmp_path: Path) -> None:
    write(tmp_path / "file", unusual)
    assert find(tmp_path / "file") is None


def rewritten(path: Path, **files: bytes) -> None:
    """The archive again, with some of its files changed."""
    content = path.read_bytes()[len(AHEAD) : -len(b"and one behind")]
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            new.writestr(name, files.get(Path(name).name, old.read(name)))
    path.write_bytes(AHEAD + result.getvalue() + b"and one behind")


def test_numbers_of_another_length_than_the_pickle_says(tmp_path: Path) -> None:
    write(tmp_path / "file", torch.randn(4, 4))
    rewritten(tmp_path / "file", **{"0": b"x" * 63})
    with pytest.raises(UserError, match="its numbers are not 16 of"):
        find(tmp_path / "file")


def test_another_byte_order_is_left_to_torch(tmp_path: Path) -> None:
    write(tmp_path / "file", torch.randn(4, 4))
    rewritten(tmp_path / "file", byteorder=b"big")
    assert find(tmp_path / "file") is None


@pytest.mark.parametrize("place", range(0, 1200, 13))
def test_a_damaged_byte_is_one_line_or_does_no_harm(place: int, tmp_path: Path) -> None:
    """As for `load_archive`: whatever byte is changed, what is read is what was saved, or there is an error."""
    path, tensor = tmp_path / "file", torch.arange(16.0)
    write(path, tensor)
    content = bytearray(path.read_bytes())
    if place >= len(content):
        return
    content[place] ^= 0xFF
    path.write_bytes(content)
    try:
        stored = find(path)
        if stored is None:
            with path.open("rb") as stream:
                slice_ = FileSlice(stream, len(AHEAD), len(content) - len(AHEAD) - len(b"and one behind"))
                assert torch.equal(load_archive(slice_, "here"), tensor)
            return
        target = torch.zeros(stored.shape, dtype=stored.dtype)
        with path.open("rb") as stream:
            check_remainder(stored, read_box(stream.fileno(), stored, (0,), target).remainder)
    except UserError as error:
        check_message(error)
        return
    assert torch.equal(target, tensor)
