"""Token files to training batches: checks the data flags, and gives every rank its micro-batches.

The order of samples is `sample_stream.py`'s; nothing in it depends on how many samples a run takes.

Legend: B = samples in a micro-batch, S = --seq-length.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split
from torch.utils.data import DataLoader, Dataset, Sampler

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.config.domain_placement import Turns, domain_shares
from megatron_moe.config.run import RunConfig
from megatron_moe.data.blend import Blend, parse_blend
from megatron_moe.data.domain_stream import DomainStream, divide_by_domain
from megatron_moe.data.domains import Domains, check_same_names, read_domains
from megatron_moe.data.indexed import IndexedFile
from megatron_moe.data.sample_index import FilePart, SampleDomains, open_index, write_index
from megatron_moe.data.sample_stream import Sample, SampleStream, require_helpers
from megatron_moe.data.stats import check_token_range
from megatron_moe.data.tokenizer.load import Tokenizer
from megatron_moe.runtime.signals import leave_signals_to_parent

Batch = dict[str, torch.Tensor]
_BATCH_KEYS = ("tokens", "labels", "loss_mask", "position_ids", "samples")
ALL_SAMPLES = Turns()
_SPLITS = {Split.train: "training", Split.valid: "validation", Split.test: "test"}


class Datasets(NamedTuple):
    """One endless stream of samples a split; None where it was not asked for."""

    train: SampleStream | DomainStream | None
    valid: SampleStream | DomainStream | None
    test: SampleStream | DomainStream | None


def build_datasets(
    run: RunConfig, tokenizer: Tokenizer, *, train: bool = False, valid: bool = False, test: bool = False
) -> Datasets:
    """Samples for training, validation and test. Every rank calls it and can read what it returns.

    Rank 0 writes the sample indices to the cache folder, which all nodes must share, and the others wait for
    it, where torch.distributed is initialised.

    Args:
        run: the run's config.
        tokenizer: the one that made the token files.
        train, valid, test: the splits that are wanted.

    Raises:
        ConfigError: a data flag is missing, malformed, or leaves a split too little text.
        UserError: a pair of token files is missing, damaged or of another tokenizer, or the cache folder
            cannot be written.
    """
    require_helpers()
    wanted = (train, valid, test)
    if not any(wanted):
        raise ValueError("no split was asked for")
    flags = run.data
    shared = flags.data_path is not None
    blends = _shared_blends(flags, wanted) if shared else _separate_blends(flags, wanted)
    vocab_size = run.model.vocab_size or tokenizer.vocab_size
    files = {source.prefix: source for blend in blends if blend for source in blend.files}
    for source in files.values():
        check_token_range(source, vocab_size)
    domains = _domains(list(files.values()), run)
    texts = [
        _text(blend, split, flags.split if shared else None, run, domains) if blend else []
        for blend, split in zip(blends, Split, strict=True)
    ]
    every_part = [part for text in texts for weighted in text for part in weighted.parts]
    for part in every_part:
        _check_length(part, run)
    # After every check: a run that is refused leaves no folder behind.
    cache = _cache_folder(flags, next(iter(files)))
    if not dist.is_initialized() or dist.get_rank() == 0:
        for part in every_part:
            write_index(part, run, tokenizer, cache)
    if dist.is_initialized():
        dist.barrier()
    return Datasets(*(_stream(text, run, tokenizer, cache, domains) if text else None for text in texts))


def with_domain_names(run: RunConfig, stream: SampleStream | DomainStream) -> RunConfig:
    """The run with the names of the domains of its data filled in.

    Raises:
        UserError: --domain-names was given, and the data have others.
    """
    names, given = stream.domain_names, run.model.domain_names
    if names is None or names == given:
        return run
    if given is not None:
        raise UserError(f"--domain-names {' '.join(given)}: the token files have {' '.join(names)}")
    return dataclasses.replace(run, model=dataclasses.replace(run.model, domain_names=names))


def _domains(files: list[IndexedFile], run: RunConfig) -> dict[str, Domains]:
    """Domains of every file's documents, by prefix, where the run knows domains."""
    if run.model.num_domains is None:
        return {}
    found = [read_domains(source.prefix, len(source.lengths)) for source in files]
    for domains in found:
        domains.check_number(run.model.num_domains)
    check_same_names(found, "--data-path")
    return {domains.prefix: domains for domains in found}


class _Text(NamedTuple):
    """What a stream reads: parts of token files and the share of samples drawn from each."""

    parts: list[FilePart]
    weights: list[float]


def _text(blend: Blend, split: Split, shares: str | None, run: RunConfig, domains: dict[str, Domains]) -> list[_Text]:
    """The text of a split; with --moe-domain-grouped that of each domain."""
    parts = _parts(blend, split, shares)
    if not run.moe.moe_domain_grouped:
        return [_Text(parts, list(blend.weights))]
    divided = divide_by_domain(parts, blend.weights, domains, run.model.num_domains or 1, _SPLITS[split])
    return [_Text(*text) for text in divided]


def _stream(
    texts: list[_Text], run: RunConfig, tokenizer: Tokenizer, cache: Path, domains: dict[str, Domains]
) -> SampleStream | DomainStream:
    if not run.moe.moe_domain_grouped:
        return _plain_stream(texts[0], run, tokenizer, cache, domains)
    streams = [_plain_stream(text, run, tokenizer, cache, domains) for text in texts]
    identity = streams[0].identity | {
        "files": [file for stream in streams for file in stream.identity["files"]],
        "weights": [weight for stream in streams for weight in stream.identity["weights"]],
        "shares of domains": list(domain_shares(run)),
    }
    return DomainStream(streams, domain_shares(run), identity)


def _plain_stream(
    text: _Text, run: RunConfig, tokenizer: Tokenizer, cache: Path, domains: dict[str, Domains]
) -> SampleStream:
    parts, weights = text
    identity: dict[str, Any] = {
        "--seed": run.training.seed,
        "--seq-length": run.model.seq_length,
        "files": [part.identity for part in parts],
        "weights": [weight / sum(weights) for weight in weights],
    }
    epochs = [open_index(part, run, tokenizer, cache) for part in parts]
    if not domains:
        return SampleStream(epochs, weights, run.training.seed, identity)
    own = [domains[part.source.prefix] for part in parts]
    identity["domains"] = list(own[0].names)
    lookups = [SampleDomains(epoch, known.ids) for epoch, known in zip(epochs, own, strict=True)]
    return SampleStream(epochs, weights, run.training.seed, identity, lookups, own[0].names)


def _parts(blend: Blend, split: Split, shares: str | None) -> list[FilePart]:
    """Each file's documents of a split, rounded as megatron-core does
    (megatron/core/datasets/blended_megatron_dataset_builder.py, `_build_megatron_dataset_splits`)."""
    span: tuple[float, float] | None = (0.0, 1.0)
    if shares is not None:
        span = convert_split_vector_to_split_matrix(parse_and_normalize_split(shares))[split.value]
    parts = []
    for source in blend.files:
        first, last = (round(bound * len(source.lengths)) for bound in span or (0.0, 0.0))
        parts.append(FilePart(source, first, last, split))
    return parts


def _shared_blends(flags: DataConfig, wanted: tuple[bool, bool, bool]) -> list[Blend | None]:
    """--data-path for every split that is wanted."""
    for name in ("valid_data_path", "test_data_path"):
        if getattr(flags, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag}: goes with --train-data-path; --data-path is divided by --split")
    if not any(float(share) for share in flags.split.split(",")):
        raise ConfigError(f"--split {flags.split}: at least one share must be greater than 0")
    blend = parse_blend(flags.data_path or (), "--data-path")
    return [blend if asked else None for asked in wanted]


def _separate_blends(flags: DataConfig, wanted: tuple[bool, bool, bool]) -> list[Blend | None]:
    """--train-data-path, --valid-data-path and --test-data-path, as far as they are wanted."""
    blends: list[Blend | None] = []
    for split, asked in zip(("train", "valid", "test"), wanted, strict=True):
        words = getattr(flags, f"{split}_data_path")
        if asked and words is None:
            instead = "--data-path or --train-data-path" if split == "train" else f"--{split}-data-path"
            also = "; --eval-interval 0 trains without" if split == "valid" else ""
            raise ConfigError(f"{instead}: needed, give the prefix of a .bin/.idx pair{also}")
        blends.append(parse_blend(words, f"--{split}-data-path") if asked else None)
    return blends


def _check_length(part: FilePart, run: RunConfig) -> None:
    """Every file's share of every wanted split must fill one sample: S + 1 tokens, for the shifted labels."""
    needed = run.model.seq_length + 1
    if part.num_tokens >= needed:
        return
    cure = "a larger share in --split, more text" if run.data.data_path is not None else "more text"
    whose = "" if part.domain is None else f" of domain {part.domain.name} (--moe-domain-grouped)"
    raise ConfigError(
        f"--seq-length {run.model.seq_length}: the {_SPLITS[part.split]} part of {part.source.prefix} holds "
        f"only {part.num_tokens} tokens{whose}, a sample takes {needed}; give {cure} or a shorter --seq-length"
    )


def _cache_folder(flags: DataConfig, prefix: str) -> Path:
    folder = Path(flags.data_cache_path) if flags.data_cache_path else Path(prefix).parent / "cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--data-cache-path {folder}: cannot make the folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--data-cache-path {folder}: not writable; give another folder")
    return folder


class MicroBatchSampler(Sampler[list[int]]):
    """Which samples a data-parallel rank takes, micro-batch by micro-batch, without end.

    Micro-batch m of rank r holds samples consumed + (m * dp_size + r) * B + [0, B). So a step of M
    micro-batches on all ranks covers the next M * B * dp_size samples in order, whatever the data-parallel
    size is. The only state is the number of samples consumed: the batch size may change from step to step.

    Args:
        consumed_samples: samples that all ranks together have consumed before.
        micro_batch_size: B.
        dp_rank, dp_size: this rank and the number of ranks that share out samples.
        turns: which samples they are: with --moe-domain-grouped those of these ranks' domains.
    """

    def __init__(
        self, consumed_samples: int, micro_batch_size: int, dp_rank: int, dp_size: int, turns: Turns = ALL_SAMPLES
    ) -> None:
        if consumed_samples < 0 or micro_batch_size < 1 or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"consumed_samples {consumed_samples}, micro_batch_size {micro_batch_size}, "
                f"dp_rank {dp_rank} of {dp_size}"
            )
        self._start = turns.begin(consumed_samples) + dp_rank * micro_batch_size
        self._micro_batch_size = micro_batch_size
        self._stride = micro_batch_size * dp_size
        self._turns = turns

    def __iter__(self) -> Iterator[list[int]]:
        start = self._start
        while True:
            yield [self._turns.number(place) for place in range(start, start + self._micro_batch_size)]
            start += self._stride


def build_data_iterator(
    dataset: Dataset[Sample],
    *,
    consumed_samples: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    turns: Turns = ALL_SAMPLES,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Endless micro-batches of one data-parallel rank; see `MicroBatchSampler` for their order.

    Args:
        dataset: one of `build_datasets`.
        consumed_samples: where to go on: samples that all ranks together have consumed.
        micro_batch_size: B.
        dp_rank, dp_size: this rank among those that share out samples.
        turns: which samples these are; see `MicroBatchSampler`.
        num_workers: loader processes; 0 reads in this one.
        pin_memory: put batches into page-locked memory, for copies to a GPU.

    Yields:
        CPU tensors [B, S]: tokens, labels and position_ids int64, loss_mask float32; and [B]: samples int64, their
        numbers in the stream. With --num-domains also domains int64 [B, S].
    """
    loader = DataLoader(
        dataset,
        batch_sampler=MicroBatchSampler(consumed_samples, micro_batch_size, dp_rank, dp_size, turns),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        # A stop signal that goes to all processes must not end a loader before the trainer has saved.
        worker_init_fn=leave_signals_to_parent,
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
    turns: Turns = ALL_SAMPLES,
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
        turns=turns,
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def _collate(samples: list[Sample]) -> Batch:
    """Samples of [S] tensors to a batch of [B, S]."""
    keys = (*_BATCH_KEYS, "domains") if "domains" in samples[0] else _BATCH_KEYS
    return {key: torch.stack([sample[key] for sample in samples]) for key in keys}
