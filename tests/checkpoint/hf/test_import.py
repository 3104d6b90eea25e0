"""Hugging Face folders as runs: the same numbers there and back, and a run like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_moe.config.yaml_io import load_run
from megatron_moe.data.tokenizer.load import SentencePieceTokenizer, load_saved_tokenizer
from tests.helpers.converting import converted
from tests.helpers.distributed import run_ranks
from tests.helpers.launch import launch
from tests.inference.test_commands import call, flags, write_rows


def test_what_is_printed(imported: tuple[Path, str]) -> None:
    _, printed = imported
    assert "MixtralForCausalLM of 41 tensors" in printed
    assert "0 missing, 0 unexpected, 0 mismatched keys" in printed
    assert "step 0, tokenizer SentencePieceTokenizer" in printed


def test_run_is_what_was_exported(imported: tuple[Path, str], mixtral_run: Path) -> None:
    folder, _ = imported
    before, after = load_run(mixtral_run / "iter_0000002" / "config.yaml"), load_run(folder / "config.yaml")
    for section in ("model", "moe", "routing"):
        assert getattr(before, section) == getattr(after, section)
    assert isinstance(load_saved_tokenizer(folder / "iter_0000000" / "tokenizer"), SentencePieceTokenizer)
    assert after.data.tokenizer_model == str(folder / "iter_0000000" / "tokenizer" / "tokenizer.model")
    assert not list(folder.parent.glob("imported.*"))


def test_scores_are_those_of_the_run(imported: tuple[Path, str], mixtral_run: Path, tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "in.jsonl", {"text": "北京的春天"}, {"text": "老师和学生"})
    for name, run in (("a", mixtral_run), ("b", imported[0])):
        run_ranks(1, call, "score", *flags(load=run, input=texts, output=tmp_path / name))
    # The rows that pad the embedding take part in the sum: they are zero in one and as they were drawn in the other.
    rows = [[json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in "ab"]
    assert [row["ids"] for row in rows[0]] == [row["ids"] for row in rows[1]]
    for one, other in zip(*rows, strict=True):
        assert one["mean"] == pytest.approx(other["mean"], abs=0.2)


def test_there_and_back_is_the_same_file(
    imported: tuple[Path, str], exported: tuple[Path, str], tmp_path: Path
) -> None:
    converted("to-hf", "--load", imported[0], "--output", tmp_path / "again", "--no-verify")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (exported[0] / "model.safetensors").read_bytes()
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "again" / name).read_text() == (exported[0] / name).read_text(), name


def pretrain(run: Path, data: Path, save: Path, *words: object) -> Any:
    base = ["--config", run / "config.yaml", "--load", run, "--save", save, "--train-data-path", data / "train"]
    base += ["--train-iters", 1, "--micro-batch-size", 2, "--device", "cpu", "--eval-interval", 0, "--progress", "off"]
    return launch(1, "megatron_moe.pretrain", *base, *words)


def test_training_starts_from_it(imported: tuple[Path, str], tiny_data: Path, tmp_path: Path) -> None:
    done = pretrain(imported[0], tiny_data, tmp_path / "new", "--finetune")
    assert done.codes == [0], done.stderr
    row = json.loads((tmp_path / "new" / "metrics.jsonl").read_text().splitlines()[0])
    # A model drawn anew is at ln 896 = 6.8 or above; this one has learned for two steps.
    assert row["lm_loss"] < 6.3


def test_going_on_with_it_is_refused(imported: tuple[Path, str], tiny_data: Path, tmp_path: Path) -> None:
    done = pretrain(imported[0], tiny_data, tmp_path / "new")
    assert done.codes == [2]
    (line,) = done.stderr.splitlines()
    assert "--finetune" in line
    assert str(imported[0]) in line


def test_folder_of_somebody_else(tmp_path: Path) -> None:
    """Random weights in bf16, saved by transformers itself: a proved run, and the same bits back."""
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(1)
    config = Qwen2MoeConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        max_position_embeddings=128,
        mlp_only_layers=[0],
        decoder_sparse_step=1,
    )
    model = Qwen2MoeForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3 if parameter.ndim == 1 else 0.0, 0.2)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    words = ["--hf", tmp_path / "hf", "--tokenizer", "NullTokenizer", "--make-vocab-size-divisible-by", 64]
    printed = converted("from-hf", *words, "--save", tmp_path / "run")
    assert "weights in bfloat16" in printed
    run = load_run(tmp_path / "run" / "config.yaml")
    assert run.training.bf16
    assert run.model.padded_vocab_size == 320
    assert run.moe.moe_shared_expert_gate
    converted("to-hf", "--load", tmp_path / "run", "--output", tmp_path / "back", "--no-verify", "--workers", 2)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype for name in before)
    assert all(torch.equal(before[name], after[name]) for name in before)
