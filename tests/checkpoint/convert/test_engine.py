"""Putting tensors together: types change where asked and nowhere else, and never so that numbers change meaning."""

import pytest
import torch

from megatron_moe.checkpoint.convert.blocks import Box, only_theirs, rename, split_rows, whole
from megatron_moe.checkpoint.convert.engine import Targets, assemble, check_fills, target_infos
from megatron_moe.config.base import UserError
from tests.helpers.tensors import MemorySource


def test_dtypes_stay_unless_another_is_asked_for() -> None:
    blocks = [*rename("a", "x", (2,)), *rename("bias", "y", (2,)), *rename("table", "t", (2,))]
    source = MemorySource(
        {"a": torch.ones(2, dtype=torch.bfloat16), "bias": torch.ones(2), "table": torch.ones(2, dtype=torch.int64)}
    )
    kept = target_infos(blocks, "theirs", source.infos)
    assert [info.dtype for info in kept.values()] == [torch.bfloat16, torch.float32, torch.int64]
    halved = target_infos(blocks, "theirs", source.infos, torch.float16, fp32_names={"y"})
    assert [info.dtype for info in halved.values()] == [torch.float16, torch.float32, torch.int64]
    assert assemble(Targets(blocks, "theirs"), whole("x", (2,)), source).dtype == torch.bfloat16


def test_what_is_filled_has_the_type_of_the_rest() -> None:
    blocks = [*rename("a", "x", (9,)), *only_theirs("gate", (1, 2), fill=1.0)]
    source = MemorySource({"a": torch.ones(9, dtype=torch.bfloat16)})
    infos = target_infos(blocks, "theirs", source.infos)
    assert infos["gate"].dtype == torch.bfloat16
    assert assemble(Targets(blocks, "theirs"), whole("gate", (1, 2)), source, torch.bfloat16).tolist() == [[1, 1]]


def test_parts_of_different_types_need_a_dtype() -> None:
    blocks = split_rows("a", ("x", "y"), (1, 1))
    source = MemorySource({"x": torch.ones(1), "y": torch.ones(1, dtype=torch.bfloat16)})
    with pytest.raises(UserError, match=r"a: is made of parts of different dtypes .*--dtype"):
        target_infos(blocks, "ours", source.infos)
    assert target_infos(blocks, "ours", source.infos, torch.float32)["a"].dtype == torch.float32


def test_scaling_rounds_once() -> None:
    """In bf16 a third of the number would be rounded before it is cast to fp32."""
    blocks = rename("a", "x", (1,), scale=1 / 3)
    source = MemorySource({"a": torch.tensor([1.0], dtype=torch.bfloat16)})
    result = assemble(Targets(blocks, "theirs"), whole("x", (1,)), source, torch.float32)
    assert result.item() == torch.tensor(1 / 3).item()


def test_numbers_keep_their_meaning() -> None:
    blocks = rename("a", "x", (2,))
    targets, box = Targets(blocks, "theirs"), whole("x", (2,))
    with pytest.raises(UserError, match=r"a: holds numbers too large for fp16"):
        assemble(targets, box, MemorySource({"a": torch.tensor([1.0, 1e6])}), torch.float16)
    assert assemble(targets, box, MemorySource({"a": torch.tensor([1.0, torch.inf])}), torch.float16)[1] == torch.inf
    with pytest.raises(UserError, match="cannot become"):
        assemble(targets, box, MemorySource({"a": torch.ones(2)}), torch.int64)
    with pytest.raises(UserError, match="do not fit"):
        assemble(targets, box, MemorySource({"a": torch.tensor([1, 300])}), torch.uint8)


def test_a_map_with_a_hole_does_not_return_memory_as_it_was() -> None:
    blocks = rename("a", "x", (2, 2))
    with pytest.raises(ValueError, match="covers 4 of its 6"):
        assemble(Targets(blocks, "theirs"), Box("x", (0, 0), (3, 2)), MemorySource({"a": torch.ones(2, 2)}))


def test_only_the_blocks_of_a_slice_are_read() -> None:
    names = [f"e{index}" for index in range(64)]
    blocks = split_rows("a", names, [2] * 64, (3,))
    source = MemorySource({name: torch.full((2, 3), float(index)) for index, name in enumerate(names)})
    result = assemble(Targets(blocks, "ours"), Box("a", (63, 1), (4, 2)), source)
    assert result.tolist() == [[31, 31], [32, 32], [32, 32], [33, 33]]
    assert source.numbers_read == 8


def test_a_tensor_that_ours_lacks_must_hold_its_fill() -> None:
    blocks = [*rename("a", "x", (2,)), *only_theirs("bias", (300, 2), fill=0.0)]
    bias = torch.zeros(300, 2)
    check_fills(blocks, MemorySource({"x": torch.ones(2), "bias": bias}))
    bias[299, 1] = 0.5
    with pytest.raises(UserError, match=r"bias: holds 0.5; our model has no such tensor"):
        check_fills(blocks, MemorySource({"x": torch.ones(2), "bias": bias}))


def test_a_missing_part_is_named() -> None:
    with pytest.raises(UserError, match="x: is missing; a is made of it"):
        target_infos(rename("a", "x", (2,)), "ours", {})
