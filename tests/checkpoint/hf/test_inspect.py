"""What lies in a checkpoint: names, shapes, experts per layer, bytes; of runs and of Hugging Face folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_moe.checkpoint.convert.tensors import TensorInfo
from megatron_moe.checkpoint.hf.inspect import experts_per_layer, inspect_checkpoint
from megatron_moe.config.base import UserError


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    return {name.replace("__", "."): TensorInfo(shape, torch.float32) for name, shape in shapes.items()}


def test_experts_of_every_naming() -> None:
    apart = infos(model__layers__0__mlp__gate_proj=(4, 2), model__layers__1__mlp__experts__7__up_proj=(4, 2))
    assert experts_per_layer(apart) == (0, 8)
    assert experts_per_layer(infos(model__layers__0__mlp__experts__gate_up_proj=(5, 8, 2))) == (5,)
    assert experts_per_layer(infos(model__layers__0__block_sparse_moe__input_linear__weight=(3, 8, 2))) == (3,)
    ours = infos(
        decoder__layers__0__mlp__experts__experts__linear_fc1__weight=(4, 8, 2),
        decoder__layers__1__mlp__experts__experts__linear_fc1__weight=(16, 8, 2),
    )
    assert experts_per_layer(ours) == (4, 16)
    assert experts_per_layer(infos(model__layers__0__mlp__gate_proj=(4, 2))) == ()


def test_hugging_face_folder(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 4, dtype=torch.bfloat16),
        "model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(6, 4, dtype=torch.bfloat16),
        "model.layers.0.mlp.experts.1.up_proj.weight": torch.zeros(6, 4, dtype=torch.bfloat16),
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.zeros(2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["XForCausalLM"]}))
    found = inspect_checkpoint(tmp_path)
    assert found.parameters == 90
    assert found.experts_per_layer == (2,)
    text = "\n".join(found.lines())
    assert "Hugging Face checkpoint, XForCausalLM" in text
    assert "parameters  90 in 4 tensors: 88 bfloat16, 2 float32" in text
    assert "model.layers.*.mlp.experts.*.up_proj.weight" in text
    assert "x2" in text
    listed = found.to_json()
    assert listed["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert listed["weight_bytes"] == 88 * 2 + 2 * 4
    assert {"name": "model.embed_tokens.weight", "shape": [10, 4], "dtype": "bfloat16", "bytes": 80} in listed[
        "tensors"
    ]
    assert inspect_checkpoint(tmp_path / "model.safetensors").kind == "safetensors file"


def test_run_of_ours(mixtral_run: Path) -> None:
    found = inspect_checkpoint(mixtral_run)
    assert found.kind == "checkpoint of megatron_moe, step 2"
    assert found.experts_per_layer == (4, 4)
    assert found.tensors["decoder.layers.1.mlp.experts.experts.linear_fc2.weight"].shape == (4, 32, 24)
    # 36 rows only pad each of the two tables.
    assert found.parameters == 80_032 + 2 * 36 * 32
    # Two moments of each.
    assert sum(info.nbytes for info in found.state.values()) >= 2 * 4 * found.parameters
    assert inspect_checkpoint(mixtral_run / "iter_0000002").tensors == found.tensors


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: no such file or folder"):
        inspect_checkpoint(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no checkpoint that is known here"):
        inspect_checkpoint(tmp_path)
