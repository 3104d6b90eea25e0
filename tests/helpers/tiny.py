"""A pyramid-residual MoE small enough to train on four ranks in a test, and token files for it."""

import dataclasses
from pathlib import Path
from typing import Any

from megatron_moe.config.data import DataConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run
from megatron_moe.data.preprocess import Preprocessing, preprocess
from megatron_moe.data.tokenizer.build import train_tokenizer
from tests.data.chinese_text import documents, write_jsonl

DOMAINS = ("news", "novel")
BASE: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "seq_length": 32,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    },
    "moe": {"num_experts": (4, 8), "expert_interval": 2, "mlp_type": "residual"},
    "parallel": {"device": "cpu"},
    "training": {"micro_batch_size": 2, "global_batch_size": 8, "train_iters": 3, "eval_interval": 0},
    "optimizer": {"lr": 1e-2, "lr_decay_style": "constant"},
    "logging": {"progress": "off"},
}


def tiny_run(**flags: Any) -> RunConfig:
    """The tiny run with some flags changed, whichever section they are in."""
    layers: dict[str, dict[str, Any]] = {name: dict(values) for name, values in BASE.items()}
    sections = {field.name: field.default_factory for field in dataclasses.fields(RunConfig)}  # type: ignore[misc]
    for flag, value in flags.items():
        section = next(name for name, kind in sections.items() if flag in vars(kind()))  # type: ignore[operator]
        layers.setdefault(section, {})[flag] = value
    return build_run(layers)


def write_tiny_data(folder: Path) -> Path:
    """Write `bpe.model` and the token files `train` and `valid`, of made-up Chinese text."""
    texts = {"train": documents(200), "valid": documents(40, seed=1)}
    return write_data(folder, texts, vocabulary=860)


def write_data(folder: Path, texts: dict[str, list[str]], vocabulary: int) -> Path:
    """Write a tokenizer learned from `train`, and a token file for each of the texts. Documents take turns between
    two domains."""
    folder.mkdir(exist_ok=True)
    paths = {name: write_jsonl(folder / f"{name}.jsonl", text, domains=DOMAINS) for name, text in texts.items()}
    train_tokenizer([paths["train"]], folder / "bpe.model", vocabulary, split_by_unicode_script=True)
    tokens = DataConfig(tokenizer_model=str(folder / "bpe.model"))
    job = Preprocessing(data=tokens, domain_key="domain", domains=DOMAINS)
    for name, path in paths.items():
        preprocess([path], folder / name, job)
    return folder


def data_flags(folder: Path) -> dict[str, Any]:
    """Flags for the token files that `write_data` wrote into `folder`."""
    return {
        "train_data_path": (str(folder / "train"),),
        "valid_data_path": (str(folder / "valid"),),
        "tokenizer_model": str(folder / "bpe.model"),
    }
