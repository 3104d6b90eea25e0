"""Checksums of tensors that ranks read in parts."""

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint import part_checks
from megatron_moe.checkpoint.part_checks import PartsRead
from megatron_moe.checkpoint.stored_tensor import StoredTensor, read_box
from megatron_moe.config.base import UserError


@pytest.mark.parametrize("damaged", [False, True])
def test_a_copy_that_is_damaged_on_one_node_is_found(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks read the same half, one of them from a damaged copy; the other half is read by the second alone."""
    path, numbers = tmp_path / "file", torch.arange(4.0)
    content = numbers.numpy().tobytes()
    path.write_bytes(content)
    stored = StoredTensor(torch.float32, (2, 2), 0, zlib.crc32(content), "file")

    def read(rank: PartsRead, row: int, source: Path) -> None:
        out = torch.empty(1, 2)
        with source.open("rb") as file:
            rank.add(path, stored, (row, 0), (1, 2), read_box(file.fileno(), stored, (row, 0), out))

    copy = tmp_path / "copy"
    copy.write_bytes(b"\1" + content[1:] if damaged else content)
    first, second = PartsRead(), PartsRead()
    read(first, 0, copy)
    read(second, 0, path)
    read(second, 1, path)

    def gather(everyones: list[Any], mine: Any) -> None:
        everyones[:] = [mine, {place: boxes for place, (_, boxes) in second.parts.items()}]

    monkeypatch.setattr(part_checks.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(part_checks.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(part_checks.dist, "all_gather_object", gather)
    if damaged:
        with pytest.raises(UserError, match=r"file: damaged \(ranks read other bytes of the same part\)"):
            first.check_together()
    else:
        first.check_together()
