"""Token files to training batches, through megatron-core's GPTDataset and blending.

Legend: B = samples in a micro-batch, S = --seq-length.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.data.blend import Blend, parse_blend
from megatron_moe.data.indexed import IndexedFile, bin_path, idx_path
from megatron_moe.data.stats import check_token_range
from megatron_moe.data.tokenizer.load import Tokenizer

Sample = dict[str, torch.Tensor]
Batch = dict[str, torch.Tensor]
_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids")
_SPLITS = ("training", "validation", "test")


class Datasets(NamedTuple):
    """One dataset a split; None where no samples were asked for."""

    train: Dataset[Sample] | None
    valid: Dataset[Sample] | None
    test: Dataset[Sample] | None


class _DatasetTokenizer:
    """What GPTDataset reads of a tokenizer.

    No `pad`, so that megatron-core masks nothing by id (megatron/core/datasets/megatron_dataset.py,
    `__init__`). `unique_identifiers` goes into the name of the cached sample indices; the files' stamps in it
    keep a cache from being used for token files that were written anew under an old prefix.
    """

    def __init__(self, tokenizer: Tokenizer, files: list[IndexedFile]) -> None:
        self.eod = tokenizer.eod
        self.vocab_size = tokenizer.vocab_size
        self.unique_identifiers = {
            "tokenizer": tokenizer.fingerprint,
            "files": {source.prefix: _stamp(source.prefix) for source in files},
        }


def build_datasets(run: RunConfig, tokenizer: Tokenizer, num_samples: tuple[int, int, int]) -> Datasets:
    """Datasets for training, validation and test. Every rank calls it and can read what it returns.

    Rank 0 writes the sample indices to the cache folder, which all nodes must share, and the others wait for
    it, where torch.distributed is initialised. The order of samples depends on the seed, the sequence length,
    the files and `num_samples`: ask for the same number when a run is resumed.

    Args:
        run: the run's config.
        tokenizer: the one that made the token files.
        num_samples: samples wanted of each split; files are read as many times over as that takes. 0: no
            dataset.

    Raises:
        ConfigError: a data flag is missing, malformed, or leaves a split too little text.
        UserError: a pair of token files is missing, damaged or of another tokenizer, or the cache folder
            cannot be written.
    """
    _require_helpers()
    flags = run.data
    shared = flags.data_path is not None
    blends = _shared_blends(flags, num_samples) if shared else _separate_blends(flags, num_samples)
    vocab_size = run.model.vocab_size or tokenizer.vocab_size
    files = _distinct_files(blends)
    for source in files:
        check_token_range(source, vocab_size)
    config = GPTDatasetConfig(
        random_seed=run.training.seed,
        sequence_length=run.model.seq_length,
        blend=_upstream_blend(blends[0] or blends[1] or blends[2]) if shared else None,
        blend_per_split=None if shared else [_upstream_blend(blend) for blend in blends],
        split=flags.split if shared else None,
        path_to_cache=str(_cache_folder(flags, files)),
        tokenizer=_DatasetTokenizer(tokenizer, files),
        reset_position_ids=flags.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=flags.eod_mask_loss,
        create_attention_mask=False,
    )
    _check_lengths(run, config, blends, num_samples)
    if config.split_matrix is not None:
        # A split of no samples must not be built: GPTDataset would loop for ever over a share without
        # documents (megatron/core/datasets/gpt_dataset.py, `_get_num_epochs`).
        config.split_matrix = [
            span if count else None for span, count in zip(config.split_matrix, num_samples, strict=True)
        ]
    return Datasets(*BlendedMegatronDatasetBuilder(GPTDataset, list(num_samples), lambda: True, config).build())


def _require_helpers() -> None:
    """megatron-core's compiled index builder, which its wheels hold, and which it can compile from source
    only in a checkout (megatron/core/datasets/utils.py, `compile_helpers`; the wheel has no Makefile)."""
    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"megatron-core: its compiled helpers_cpp cannot be imported ({error}); install a wheel "
            "for this Python: "
            "pip install --force-reinstall --no-deps --only-binary :all: 'megatron-core>=0.19,<0.20'"
        ) from error


def _shared_blends(flags: DataConfig, num_samples: tuple[int, int, int]) -> list[Blend | None]:
    """--data-path for every split that is wanted."""
    for name in ("valid_data_path", "test_data_path"):
        if getattr(flags, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: goes with --train-data-path; --data-path is divided by --split")
    if not any(float(share) for share in flags.split.split(",")):
        raise ConfigError(f"--split {flags.split}: at least one share must be greater than 0")
    blend = parse_blend(flags.data_path or (), "--data-path")
    return [blend if count else None for count in num_samples]


def _separate_blends(flags: DataConfig, num_samples: tuple[int, int, int]) -> list[Blend | None]:
    """--train-data-path, --valid-data-path and --test-data-path, as far as they are wanted."""
    blends: list[Blend | None] = []
    for split, count in zip(("train", "valid", "test"), num_samples, strict=True):
        words = getattr(flags, f"{split}_data_path")
        if count and words is None:
            instead = "--data-path or --train-data-path" if split == "train" else f"--{split}-data-path"
            also = "; --eval-interval 0 trains without" if split == "valid" else ""
            raise ConfigError(f"{instead}: needed, give the prefix of a .bin/.idx pair{also}")
        blends.append(parse_blend(words, f"--{split}-data-path") if count else None)
    return blends


def _distinct_files(blends: list[Blend | None]) -> list[IndexedFile]:
    found = {source.prefix: source for blend in blends if blend for source in blend.files}
    if not found:
        raise ConfigError("--train-iters: no samples were asked for")
    return list(found.values())


def _upstream_blend(blend: Blend | None) -> tuple[list[str], list[float] | None] | None:
    """A blend as megatron-core takes it: a single file has no weight, as it needs no blending."""
    if blend is None:
        return None
    return list(blend.prefixes), list(blend.weights) if len(blend.files) > 1 else None


def _check_lengths(
    run: RunConfig, config: GPTDatasetConfig, blends: list[Blend | None], num_samples: tuple[int, int, int]
) -> None:
    """Every file's share of every wanted split must fill one sample: S + 1 tokens, for the shifted labels."""
    needed = run.model.seq_length + 1
    for position, (blend, count) in enumerate(zip(blends, num_samples, strict=True)):
        if blend is None or not count:
            continue
        for source in blend.files:
            span = config.split_matrix[position] if config.split_matrix is not None else (0.0, 1.0)
            tokens = _tokens_in(source, span)
            if tokens >= needed:
                continue
            cure = "a larger share in --split, more text" if config.split_matrix is not None else "more text"
            raise ConfigError(
                f"--seq-length {run.model.seq_length}: the {_SPLITS[position]} part of {source.prefix} holds "
                f"only {tokens} tokens, a sample takes {needed}; give {cure} or a shorter --seq-length"
            )


def _tokens_in(source: IndexedFile, span: tuple[float, float] | None) -> int:
    """Tokens in a split's range of documents, rounded as BlendedMegatronDatasetBuilder does."""
    if span is None:
        return 0
    first, last = (round(bound * len(source.lengths)) for bound in span)
    return int(source.lengths[first:last].sum(dtype="int64"))


def _cache_folder(flags: DataConfig, files: list[IndexedFile]) -> Path:
    folder = Path(flags.data_cache_path) if flags.data_cache_path else Path(files[0].prefix).parent / "cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data-cache-path {folder}: cannot make the folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--data-cache-path {folder}: not writable; give another folder")
    return folder


def _stamp(prefix: str) -> list[int]:
    stats = [path(prefix).stat() for path in (bin_path, idx_path)]
    return [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)]


class MicroBatchSampler(Sampler[list[int]]):
    """Which samples a data-parallel rank takes, micro-batch by micro-batch, without end.

    Micro-batch m of rank r holds samples consumed + (m * dp_size + r) * B + [0, B). So a step of M
    micro-batches on all ranks covers the next M * B * dp_size samples in order, whatever the data-parallel
    size is. The only state is the number of samples consumed: the batch size may change from step to step.

    After the last sample it starts again with the first.

    Args:
        dataset_size: samples there are.
        consumed_samples: samples that all ranks together have consumed before.
        micro_batch_size: B.
        dp_rank, dp_size: this rank and the number of ranks that share out samples.
    """

    def __init__(
        self, dataset_size: int, consumed_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int
    ) -> None:
        if dataset_size < 1 or consumed_samples < 0 or micro_batch_size < 1 or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"dataset_size {dataset_size}, consumed_samples {consumed_samples}, micro_batch_size "
                f"{micro_batch_size}, dp_rank {dp_rank} of {dp_size}"
            )
        self._dataset_size = dataset_size
        self._start = consumed_samples + dp_rank * micro_batch_size
        self._micro_batch_size = micro_batch_size
        self._stride = micro_batch_size * dp_size

    def __iter__(self) -> Iterator[list[int]]:
        start = self._start
        while True:
            yield [index % self._dataset_size for index in range(start, start + self._micro_batch_size)]
            start += self._stride


def build_data_iterator(
    dataset: Dataset[Sample],
    *,
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Endless micro-batches of one data-parallel rank; see `MicroBatchSampler` for their order.

    Args:
        dataset: one of `build_datasets`.
        consumed_samples: where to go on: samples that all ranks together have consumed.
        micro_batch_size: B.
        dp_rank, dp_size: this rank among those that share out samples.
        num_workers: loader processes; 0 reads in this one.
        pin_memory: put batches into page-locked memory, for copies to a GPU.

    Yields:
        CPU tensors [B, S]: tokens, labels and position_ids int64, loss_mask float32.
    """
    size = len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__
    loader = DataLoader(
        dataset,
        batch_sampler=MicroBatchSampler(size, consumed_samples, micro_batch_size, dp_rank, dp_size),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        # A generator of its own: a loader draws a seed, and must not draw it from the one that dropout uses.
        generator=torch.Generator(),
    )
    return iter(loader)


def build_eval_iterator(
    dataset: Dataset[Sample],
    *,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Micro-batches from the first sample on: every evaluation sees the same text, so losses can be compared.

    Arguments and batches are those of `build_data_iterator`.
    """
    return build_data_iterator(
        dataset,
        consumed_samples=0,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def _collate(samples: list[dict[str, Any]]) -> Batch:
    """Samples of [S] tensors to a batch of [B, S]; a blend's `dataset_id` is left out."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in _BATCH_KEYS}
