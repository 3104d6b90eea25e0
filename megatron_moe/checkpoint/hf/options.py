"""Flags of tools/convert_checkpoint.py, a class for each command. No torch here."""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.base import ConfigError, require, require_positive

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, as what, and where to."""

    load: str
    """A run's directory (its --save)."""
    output: str
    """Folder to write; it appears when it is complete and verified."""
    iteration: int | None = None
    """Step of the checkpoint. Default: the latest."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights. auto: as the checkpoint has them."""
    target: str | None = None
    """model_type of the class to export to, as mixtral or megatron_moe. Default: the first that is exact."""
    allow_lossy: bool = False
    """Export to a --target that does not compute what the model computes; the card says what was lost."""
    max_shard_size: str = "5GB"
    """Largest file of weights, as 5GB or 500MiB."""
    workers: int | None = None
    """Processes that convert. Default: one for each core, and one alone for a small checkpoint."""
    chat_template: str | None = None
    """File with a jinja template. Default: the tokenizer's own, if it has one."""
    license: str | None = None
    """Licence of the weights for the card, as Hugging Face abbreviates it: apache-2.0."""
    license_file: str | None = None
    """Its text, copied to LICENSE."""
    verify: bool = True
    """Load the folder in a fresh process and compare its logits with the model's. Without it the card says so."""

    def __post_init__(self) -> None:
        require(self.iteration is None or self.iteration >= 0, "iteration", self.iteration, "at least 0")
        require_positive(self, "workers")
        byte_count(self.max_shard_size)
        if self.allow_lossy and self.target is None:
            raise ConfigError("--allow-lossy: needs --target; without it only exact classes are chosen")
        if self.license_file is not None and self.license is None:
            raise ConfigError("--license-file: needs --license, which names it in the card")

    @property
    def shard_bytes(self) -> int:
        """--max-shard-size in bytes."""
        return byte_count(self.max_shard_size)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What is imported, and where to."""

    hf: str
    """Folder of a Hugging Face checkpoint: config.json, safetensors files, tokenizer."""
    save: str
    """Run's directory to write; it appears when it is complete and verified."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights. auto: as the folder has them."""
    tokenizer: str | None = None
    """Tokenizer (folder or .model file) instead of the folder's own; NullTokenizer: ids without text."""
    make_vocab_size_divisible_by: int | None = None
    """The embedding is padded to a multiple of this; the tensor-parallel size must divide it. Default: 128, or as the
    run had it that the folder was exported from."""
    workers: int | None = None
    """Processes that convert. Default: one for each core, and one alone for a small checkpoint."""
    verify: bool = True
    """Compare the logits of the run with those of the folder, which a fresh process loads."""

    def __post_init__(self) -> None:
        require_positive(self, "workers", "make_vocab_size_divisible_by")


@dataclass(frozen=True, kw_only=True)
class ForeignOptions:
    """What is imported, and where to."""

    source: str
    """Folder of the checkpoint."""
    save: str
    """Run's directory to write; it appears when it is complete."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the weights. auto: as the checkpoint has them."""
    tokenizer: str | None = None
    """Tokenizer (folder or .model file) instead of the folder's own; NullTokenizer: ids without text."""
    config: str | None = None
    """YAML with sections of flags (model, moe) that the checkpoint does not say, or that go over what it says."""
    workers: int | None = None
    """Processes that convert. Default: one for each core, and one alone for a small checkpoint."""

    def __post_init__(self) -> None:
        require_positive(self, "workers")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What is compared."""

    load: str
    """A run's directory (its --save)."""
    hf: str
    """Folder of a Hugging Face checkpoint."""
    iteration: int | None = None
    """Step of the run's checkpoint. Default: the latest."""

    def __post_init__(self) -> None:
        require(self.iteration is None or self.iteration >= 0, "iteration", self.iteration, "at least 0")


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """What is shown, and how."""

    path: str
    """A run, one of its checkpoints, a Hugging Face folder, or a checkpoint of PAI, DeepSpeed or Megatron-LM."""
    json: bool = False
    """Print all tensors as JSON."""


def byte_count(text: str) -> int:
    """The bytes that `5GB` or `500MiB` stands for.

    Raises:
        ConfigError: it is no such size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"--max-shard-size {text}: must be a size like 5GB or 500MiB")
    power = " KMGT".index(match[2].upper() or " ")
    return max(1, int(float(match[1]) * (1024 if match[3] else 1000) ** power))
