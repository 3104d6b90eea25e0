"""Folders with the names that transformers has in memory hold the same as those with the names it writes by default."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_moe.checkpoint.convert.blocks import Box, whole
from megatron_moe.checkpoint.convert.safetensors_files import SafetensorsSource
from megatron_moe.checkpoint.hf.usual_names import UsualNames, has_names_of_memory
from megatron_moe.config.base import UserError
from tests.checkpoint.hf.test_families import their_config


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoeshared", "glm4_moe"])
def test_the_same_tensors_by_the_same_names(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(their_config(kind))
    model.save_pretrained(tmp_path / "usual")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    usual, memory = SafetensorsSource(tmp_path / "usual"), SafetensorsSource(tmp_path / "memory")
    assert not has_names_of_memory(usual)
    assert has_names_of_memory(memory)
    shown = UsualNames(memory, kind)
    assert shown.infos == dict(usual.infos)
    for name, info in shown.infos.items():
        box = whole(name, info.shape)
        assert torch.equal(shown.read(box), usual.read(box)), name
        # A part of it, into memory that is there.
        part = Box(name, tuple(size // 2 for size in info.shape), tuple(size - size // 2 for size in info.shape))
        out = torch.empty(part.size, dtype=info.dtype)
        shown.read_into(part, out)
        assert torch.equal(out, usual.read(part)), name


FIRST, SECOND = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (FIRST, (4, 6), r"has the shape \[4, 6\]; must be \[experts, 2 x width, hidden\]"),
        (FIRST, (4, 5, 8), r"has the shape \[4, 5, 8\]; must be"),
        (FIRST, (4, 0, 8), r"has the shape \[4, 0, 8\]; must be"),
        (SECOND, (4, 6, 8, 1), r"has the shape \[4, 6, 8, 1\]; must be \[experts, hidden, width\]"),
        (
            "model.layers.0.mlp.experts.1.gate_proj.weight",
            (3, 8),
            r"model.layers.0.mlp.experts.1.gate_proj.weight.* a second time; the files are of two models",
        ),
    ],
)
def test_what_does_not_lie_as_in_memory_is_one_line(
    name: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    save_file({FIRST: torch.zeros(4, 6, 8), name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        UsualNames(SafetensorsSource(tmp_path), "qwen3_moe")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
