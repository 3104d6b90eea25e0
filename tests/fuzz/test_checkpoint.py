"""Damaged files of a checkpoint: one line, or the tensors and values that were saved."""

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from megatron_moe.checkpoint.safe_archive import load_archive
from megatron_moe.checkpoint.safe_pickle import read_pickle
from megatron_moe.checkpoint.safe_reader import REPLACEMENTS, SafeReader, user_error
from megatron_moe.checkpoint.torch_metadata import read_metadata
from megatron_moe.config.base import UserError
from megatron_moe.runtime import replace
from tests.helpers.fuzzing import Guard, check_message, damaged, examples, in_child

STATE = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(5, dtype=torch.bfloat16), "step": 7}


def test_the_index_of_a_checkpoint(tmp_path: Path) -> None:
    in_child(fuzz_index, tmp_path)


def fuzz_index(guard: Guard, folder: Path) -> None:
    replace.apply(REPLACEMENTS)
    place = folder / "checkpoint"
    dcp.save(dict(STATE), checkpoint_id=place, no_dist=True)
    valid = (place / ".metadata").read_bytes()
    load(place)
    guard.limit_memory(300)
    accepted: list[Any] = []

    @examples(300)
    @given(damaged(valid, header=len(valid)))
    def check(content: bytes) -> None:
        guard.start(content)
        (place / ".metadata").write_bytes(content)
        try:
            read_metadata(place)
        except UserError as error:
            check_message(error)
            return
        try:
            found = load(place)
        except (Exception, CheckpointException) as error:  # noqa: BLE001  # load.py makes one line of them
            inner = user_error(error)
            if inner is not None:
                check_message(inner)
            return
        accepted.append(found)
        assert torch.equal(found["weight"], STATE["weight"])
        assert torch.equal(found["bias"], STATE["bias"])
        assert found["step"] == STATE["step"]

    check()
    assert len(accepted) > 3


def load(place: Path) -> dict[str, Any]:
    found = {"weight": torch.zeros(3, 4), "bias": torch.zeros(5, dtype=torch.bfloat16), "step": 0}
    dcp.load(found, storage_reader=SafeReader(place), no_dist=True)
    return found


def test_archives(tmp_path: Path) -> None:
    in_child(fuzz_archives, tmp_path)


def fuzz_archives(guard: Guard, folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save([{"rng": torch.arange(8), "step": 3, "name": "x"}], buffer)
    valid = buffer.getvalue()
    guard.limit_memory(300)

    @examples(300)
    @given(damaged(valid, header=len(valid)))
    def check(content: bytes) -> None:
        guard.start(content)
        try:
            found = load_archive(io.BytesIO(content), "file at byte 0")
        except UserError as error:
            check_message(error)
            return
        assert isinstance(found, (list, dict, tuple, int, str, torch.Tensor, type(None), float))

    check()


def test_pickles(tmp_path: Path) -> None:
    in_child(fuzz_pickles, tmp_path)


def fuzz_pickles(guard: Guard, folder: Path) -> None:
    """Any operations in any order: no crash of the interpreter, and nothing but data comes out."""
    guard.limit_memory(300)
    codes = [bytes([code]) for code in range(128, 151)] + [
        bytes([code]) for code in b"(.0125FNIJKLMQRSTUXabcdeghijloprtsu}])\x80"
    ]
    piece = st.one_of(st.sampled_from(codes), st.binary(max_size=3), st.sampled_from([b"cos\nsystem\n", b"\x8c\x02os"]))

    @examples(500)
    @given(st.lists(piece, max_size=40).map(lambda pieces: b"\x80\x04" + b"".join(pieces) + b"."))
    def check(content: bytes) -> None:
        guard.start(content)
        try:
            read_pickle(content, frozenset({"torch.Size"}), "file")
        except UserError as error:
            check_message(error)

    check()
