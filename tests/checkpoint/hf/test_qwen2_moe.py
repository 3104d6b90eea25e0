"""What is written for programs that serve Qwen2-MoE where our model has nothing, and files that lack it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint.convert.blocks import Box
from megatron_moe.checkpoint.convert.coverage import check_side
from megatron_moe.checkpoint.convert.engine import check_fills
from megatron_moe.checkpoint.hf.families.qwen2_moe import FAMILY, HALF_GATE
from megatron_moe.checkpoint.hf.weight_files import open_files
from megatron_moe.config.yaml_io import build_run
from tests.checkpoint.hf.test_families import their_config
from tests.helpers.hf_parity import TOLERANCE, Ours, convert, load_theirs, randomise_theirs, their_logits


def test_half_a_gate_is_half_and_not_nothing() -> None:
    """sigmoid as transformers computes it, and as llama.cpp does: silu(x) / x (src/models/qwen2moe.cpp)."""
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.bfloat16, torch.float32):
        hidden = (30 * torch.randn(1000, 4096, generator=generator)).to(dtype)
        logits = hidden @ torch.full((4096,), HALF_GATE, dtype=dtype)
        assert bool((logits != 0).all())
        assert torch.equal(torch.sigmoid(logits), torch.full_like(logits, 0.5))
    assert torch.equal(torch.nn.functional.silu(logits) / logits, torch.full_like(logits, 0.5))


pytestmark = pytest.mark.usefixtures("world")


def test_files_without_biases_are_read(tmp_path: Path) -> None:
    """As if they held zeros, which is what comes back."""
    from transformers import AutoModelForCausalLM

    config = their_config("qwen2_moe", qkv_bias=False)
    randomise_theirs(AutoModelForCausalLM.from_config(config).float().eval(), 1).save_pretrained(tmp_path)
    flags = FAMILY.flags(json.loads((tmp_path / "config.json").read_text()))
    run = build_run(flags, {"parallel": {"device": "cpu"}, "training": {"train_iters": 1}})
    assert not run.model.add_qkv_bias
    source, blocks = open_files(tmp_path, FAMILY, run), FAMILY.blocks(run)
    check_side(blocks, "theirs", source.infos, "the files")
    check_fills(blocks, source)
    theirs = {name: source.read(Box(name, (0,) * len(info.shape), info.shape)) for name, info in source.infos.items()}
    for name, info in source.infos.items():
        out = torch.full(info.shape, 5.0, dtype=info.dtype)
        source.read_into(Box(name, (0,) * len(info.shape), info.shape), out)
        assert torch.equal(out, theirs[name])
    ours = convert(blocks, "ours", theirs)
    assert float((their_logits(load_theirs(tmp_path)) - Ours(run).load(ours).logits()).abs().max()) <= TOLERANCE
    biases = [name for name in theirs if name.endswith("_proj.bias")]
    assert len(biases) == 3 * run.model.num_layers
    written = convert(blocks, "theirs", ours)
    assert FAMILY.config(run)["qkv_bias"] is True
    assert all(written[name].shape == theirs[name].shape and not written[name].any() for name in biases)


def test_files_that_lack_weights_are_refused() -> None:
    """Only biases are implied."""
    flags = FAMILY.flags(json.loads(their_config("qwen2_moe", qkv_bias=False).to_json_string(use_diff=False)))
    run = build_run(flags, {"parallel": {"device": "cpu"}, "training": {"train_iters": 1}})
    implied = [block.theirs for block in FAMILY.blocks(run) if block.implied]
    assert implied
    assert all(box is not None and box.name.endswith("_proj.bias") for box in implied)
    biased = dataclasses.replace(run, model=dataclasses.replace(run.model, add_qkv_bias=True))
    assert not [block for block in FAMILY.blocks(biased) if block.implied]
