"""Folders with the names that transformers has in memory hold the same as those with the names it writes by default."""

from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint.convert.blocks import Box, whole
from megatron_moe.checkpoint.convert.safetensors_files import SafetensorsSource
from megatron_moe.checkpoint.hf.usual_names import UsualNames, has_names_of_memory
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
