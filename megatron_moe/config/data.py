"""Which tokens a run reads, and with which tokenizer."""

from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.base import ConfigError, require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data flags. Prefixes name a .bin/.idx pair without its ending (tools/preprocess_data.py writes
    them)."""

    data_path: tuple[str, ...] | None = None
    """Prefixes, or weights and prefixes in turn (0.3 a 0.7 b); --split divides them."""
    train_data_path: tuple[str, ...] | None = None
    """Prefixes or weights and prefixes for training, instead of --data-path."""
    valid_data_path: tuple[str, ...] | None = None
    """The same for evaluation during training."""
    test_data_path: tuple[str, ...] | None = None
    """The same for the test set."""
    split: str = "969,30,1"
    """Shares of --data-path for training, validation and test."""
    data_cache_path: str | None = None
    """Where sample indices are kept. Default: a folder `cache` beside the data."""
    num_workers: int = 0
    """Data-loader processes per rank (0: load in the training process)."""
    eod_mask_loss: bool = False
    """No loss on end-of-document tokens."""
    reset_position_ids: bool = False
    """Positions start at 0 after every end-of-document token."""
    tokenizer_type: Literal[
        "SentencePieceTokenizer",
        "HuggingFaceTokenizer",
        "GPT2BPETokenizer",
        "JiebaBPETokenizer",
        "CPMTokenizer",
        "NullTokenizer",
    ] = "SentencePieceTokenizer"
    """SentencePiece model; Hugging Face tokenizer folder; GPT-2's vocab.json and merges.txt; PAI's jieba + BPE
    (tokenizer.json); CPM's jieba + SentencePiece; or none: ids 0..vocab_size-1, the last one ends documents."""
    tokenizer_model: str | None = None
    """The .model or tokenizer.json file, or the tokenizer's folder."""
    merge_file: str | None = None
    """GPT2BPETokenizer: its merges.txt, where --tokenizer-model is the vocab.json. Default: the one beside it."""

    def __post_init__(self) -> None:
        shares = self.split.split(",")
        valid = all(share.strip().replace(".", "", 1).isdigit() for share in shares) and 1 <= len(shares) <= 3
        require(valid, "split", self.split, "one to three numbers, like 969,30,1")
        if self.data_path is not None and self.train_data_path is not None:
            raise ConfigError("--data-path and --train-data-path: give one of them")
        if self.merge_file is not None and self.tokenizer_type != "GPT2BPETokenizer":
            raise ConfigError(
                f"--merge-file: belongs to --tokenizer-type GPT2BPETokenizer, not to {self.tokenizer_type}"
            )
