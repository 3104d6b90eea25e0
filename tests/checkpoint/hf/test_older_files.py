"""Folders that hold more than the class reads, or spell it as older versions did: a proved run all the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, GPT2Config, PreTrainedConfig

from tests.checkpoint.hf.test_deepseek_v3 import SIZES
from tests.helpers.converting import converted
from tests.helpers.hf_parity import randomise_theirs

type Tensors = dict[str, Tensor]


def as_gpt2_was_published(tensors: Tensors) -> Tensors:
    """No prefix, and causal masks beside the weights."""
    mask = {"attn.bias": torch.ones(1, 1, 50, 50).tril(), "attn.masked_bias": torch.tensor(-1e4)}
    masks = {f"h.{layer}.{name}": value.clone() for layer in range(2) for name, value in mask.items()}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks


def with_a_layer_that_predicts_later_tokens(tensors: Tensors) -> Tensors:
    """Past the last one, as DeepSeek-V3 was published."""
    last = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.2.")}
    layer = {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in last.items()}
    return tensors | layer | {"model.layers.3.eh_proj.weight": torch.ones(64, 128)}


FOLDERS: dict[str, tuple[PreTrainedConfig, Callable[[Tensors], Tensors]]] = {
    "gpt2": (GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=50), as_gpt2_was_published),
    "deepseek_v3": (DeepseekV3Config(**SIZES), with_a_layer_that_predicts_later_tokens),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_weights_are_taken_and_the_rest_is_left(name: str, tmp_path: Path) -> None:
    config, change = FOLDERS[name]
    folder = tmp_path / "hf"
    model = randomise_theirs(AutoModelForCausalLM.from_config(config).float())
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(change(weights), file, metadata={"format": "pt"})
    # The proof compares the logits.
    printed = converted("from-hf", "--hf", folder, "--tokenizer", "NullTokenizer", "--save", tmp_path / "run")
    assert f"of {len(weights)} tensors" in printed
    assert "0 missing, 0 unexpected" in printed


@pytest.mark.parametrize(("dtype", "said"), [("auto", 1), ("fp32", 0)])
def test_rounding_of_what_has_more_bits_than_the_others_is_said(dtype: str, said: int, tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=50)
    folder = tmp_path / "hf"
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["transformer.ln_f.weight"] = weights["transformer.ln_f.weight"].float()
    save_file(weights, file, metadata={"format": "pt"})
    words = ("--hf", folder, "--tokenizer", "NullTokenizer", "--no-verify", "--dtype", dtype)
    printed = converted("from-hf", *words, "--save", tmp_path / "run")
    assert printed.count("note: 1 tensors were rounded") == said
    assert printed.count("transformer.ln_f.weight is float32") == said
