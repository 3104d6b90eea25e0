"""Batches: right contents, the same samples for every data-parallel size, resumption, and one-line errors."""

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.config.model import ModelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.data.datasets import Batch, build_data_iterator, build_datasets, build_eval_iterator
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.tokenizer.load import NullTokenizer

SEQ = 16
TOKENIZER = NullTokenizer(1000)


def write(prefix: Path, documents: int, seed: int = 0, length: int = 40, low: int = 0, high: int = 999) -> str:
    """A pair of random documents, each ended by id 999."""
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.dtype(np.uint16)) as writer:
        for _ in range(documents):
            size = int(random.integers(2, length))
            tokens = random.integers(low, high, size).astype(np.uint16)
            tokens[-1] = TOKENIZER.eod
            writer.add(tokens, np.array([size], np.int32))
    return str(prefix)


def run_config(*, seq_length: int = SEQ, **data: object) -> RunConfig:
    flags = DataConfig(tokenizer_type="NullTokenizer", **data)  # type: ignore[arg-type]
    return RunConfig(data=flags, model=ModelConfig(seq_length=seq_length))


def take(batches: object, count: int) -> torch.Tensor:
    """[count * B, S] tokens of the next micro-batches."""
    return torch.cat([batch["tokens"] for batch in islice(batches, count)])  # type: ignore[call-overload]


def test_a_batch_holds_shifted_labels(tmp_path: Path) -> None:
    run = run_config(data_path=(write(tmp_path / "a", 100),), split="1")
    dataset = build_datasets(run, TOKENIZER, train=True).train
    assert dataset is not None
    batch = next(build_data_iterator(dataset, consumed_samples=0, micro_batch_size=3, dp_rank=0, dp_size=1))
    assert list(batch) == ["tokens", "labels", "loss_mask", "position_ids", "samples"]
    assert batch.pop("samples").tolist() == [0, 1, 2]
    assert all(tensor.shape == (3, SEQ) for tensor in batch.values())
    types = [tensor.dtype for tensor in batch.values()]
    assert types == [torch.int64, torch.int64, torch.float32, torch.int64]
    assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
    assert torch.equal(batch["position_ids"], torch.arange(SEQ).expand(3, SEQ))
    assert bool((batch["loss_mask"] == 1).all())


def test_document_ends_reset_positions_and_mask_loss(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", 100, length=8)
    run = run_config(data_path=(prefix,), split="1", reset_position_ids=True, eod_mask_loss=True)
    dataset = build_datasets(run, TOKENIZER, train=True).train
    assert dataset is not None
    batch = next(build_data_iterator(dataset, consumed_samples=0, micro_batch_size=8, dp_rank=0, dp_size=1))
    ends = batch["tokens"] == TOKENIZER.eod
    assert bool(ends.any())
    assert torch.equal(batch["loss_mask"] == 0, ends)
    assert bool((batch["position_ids"][:, 1:][ends[:, :-1]] == 0).all())


def test_every_data_parallel_size_sees_the_same_global_batches(tmp_path: Path) -> None:
    run = run_config(data_path=(write(tmp_path / "a", 200),), split="1")
    dataset = build_datasets(run, TOKENIZER, train=True).train
    assert dataset is not None

    def step(consumed: int, micro_batch: int, ranks: int, micro_batches: int) -> torch.Tensor:
        """The samples of one step over all ranks, in global order."""
        parts = []
        for rank in range(ranks):
            batches = build_data_iterator(
                dataset, consumed_samples=consumed, micro_batch_size=micro_batch, dp_rank=rank, dp_size=ranks
            )
            parts.append(take(batches, micro_batches).view(micro_batches, micro_batch, SEQ))
        return torch.stack(parts, dim=1).reshape(-1, SEQ)

    alone = step(24, 12, 1, 1)
    for micro_batch, ranks, micro_batches in ((1, 1, 12), (3, 4, 1), (2, 2, 3), (1, 4, 3)):
        assert torch.equal(step(24, micro_batch, ranks, micro_batches), alone)


def test_resuming_and_ramping_up_go_on_where_they_stopped(tmp_path: Path) -> None:
    run = run_config(data_path=(write(tmp_path / "a", 200),), split="1")
    dataset = build_datasets(run, TOKENIZER, train=True).train
    assert dataset is not None

    def batches(consumed: int) -> object:
        return build_data_iterator(
            dataset, consumed_samples=consumed, micro_batch_size=2, dp_rank=0, dp_size=1, num_workers=0
        )

    whole = take(batches(0), 20)
    # Steps of 1, 2 and 3 micro-batches draw from one iterator; a resumed one starts after them.
    one = batches(0)
    ramp = torch.cat([take(one, count) for count in (1, 2, 3)])
    assert torch.equal(ramp, whole[:12])
    assert torch.equal(take(batches(12), 14), whole[12:])


def test_loader_processes_change_nothing_and_touch_no_seed(tmp_path: Path) -> None:
    run = run_config(data_path=(write(tmp_path / "a", 200),), split="1")
    dataset = build_datasets(run, TOKENIZER, train=True).train
    assert dataset is not None
    torch.manual_seed(5)
    before = torch.get_rng_state()
    tokens = []
    for workers in (0, 2):
        batches = build_eval_iterator(dataset, micro_batch_size=2, dp_rank=0, dp_size=1, num_workers=workers)
        tokens.append(take(batches, 6))
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(torch.get_rng_state(), before)


def owners(dataset: object, samples: int) -> list[float]:
    """Share of documents below and above id 500, from tokens that tell the file they are of."""
    batch: Batch = next(build_eval_iterator(dataset, micro_batch_size=samples, dp_rank=0, dp_size=1))  # type: ignore[arg-type]
    ids = batch["tokens"][batch["tokens"] != TOKENIZER.eod]
    return [float((ids < 500).float().mean()), float((ids >= 500).float().mean())]


def test_blends_follow_weights_or_sizes(tmp_path: Path) -> None:
    low = write(tmp_path / "low", 100, high=500)
    high = write(tmp_path / "high", 300, seed=1, low=500)
    weighted = build_datasets(run_config(data_path=("0.8", low, "0.2", high), split="1"), TOKENIZER, train=True)
    assert owners(weighted.train, 200)[0] == pytest.approx(0.8, abs=0.03)
    by_size = build_datasets(run_config(data_path=(low, high), split="1"), TOKENIZER, train=True)
    assert owners(by_size.train, 400)[1] == pytest.approx(0.75, abs=0.05)


def test_splits_and_separate_paths(tmp_path: Path) -> None:
    low = write(tmp_path / "low", 100, high=500)
    high = write(tmp_path / "high", 100, seed=1, low=500)
    split = build_datasets(run_config(data_path=(low,), split="8,1,1"), TOKENIZER, train=True, valid=True, test=True)
    assert all(dataset is not None for dataset in split)
    apart = build_datasets(
        run_config(train_data_path=(low,), valid_data_path=(high,)), TOKENIZER, train=True, valid=True
    )
    assert owners(apart.train, 20)[0] == 1.0
    assert owners(apart.valid, 10)[1] == 1.0
    assert apart.test is None


def test_new_files_under_an_old_name_are_not_read_through_an_old_cache(tmp_path: Path) -> None:
    run = run_config(data_path=(write(tmp_path / "a", 100),), split="1")
    build_datasets(run, TOKENIZER, train=True)
    write(tmp_path / "a", 20, seed=3)
    fresh = build_datasets(run, TOKENIZER, train=True).train
    assert take(build_eval_iterator(fresh, micro_batch_size=5, dp_rank=0, dp_size=1), 8).shape == (40, SEQ)  # type: ignore[arg-type]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    good = write(tmp_path / "good", 100)
    short = write(tmp_path / "short", 1, length=4)
    long = write(tmp_path / "long", 100)
    none = str(tmp_path / "none")
    blocked = tmp_path / "file"
    blocked.touch()
    cases: list[tuple[dict[str, object], str]] = [
        ({}, "--data-path or --train-data-path: needed"),
        ({"data_path": ()}, "--data-path: needs at least one prefix"),
        (
            {"data_path": (none,)},
            r"--data-path .*none: no file .*none\.idx; write it with tools/preprocess_data",
        ),
        ({"data_path": ("0.5", good, "x")}, "weights and prefixes must come in turn .* 3 words"),
        ({"data_path": ("0.5", good, "half", good)}, "'half' before .* must be a weight"),
        ({"data_path": ("-1", good, "2", good)}, "weight -1 of .* must be greater than 0"),
        ({"data_path": ("nan", good, "2", good)}, "weight nan of .* must be greater than 0"),
        ({"data_path": ("1", good, "2", f"{tmp_path}/./good")}, r"--data-path: .*\./good is given twice"),
        ({"data_path": ("1e-8", good, "1", long)}, "file 1 of the blend has weight 1e-08 .* less than one sample"),
        ({"data_path": (good,), "split": "0,0"}, "--split 0,0: at least one share"),
        ({"data_path": (good,), "split": "1"}, "the validation part of .*good holds only 0 tokens"),
        ({"data_path": (short,), "split": "1,1"}, "the training part of .*short holds only . tokens"),
        (
            {"data_path": (good,), "valid_data_path": (good,)},
            "--valid-data-path: goes with --train-data-path",
        ),
        ({"train_data_path": (good,)}, "--valid-data-path: needed.*--eval-interval 0"),
        ({"data_path": (good,), "split": "9,1", "data_cache_path": str(blocked)}, "cannot make the folder"),
    ]
    for data, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            build_datasets(run_config(**data), TOKENIZER, train=True, valid=True)
        assert "\n" not in str(caught.value)


def test_another_tokenizer_s_files_are_refused(tmp_path: Path) -> None:
    run = run_config(data_path=(write(tmp_path / "a", 100),), split="1")
    with pytest.raises(UserError, match="holds token id 999, but the vocabulary has 500"):
        build_datasets(run, NullTokenizer(500), train=True)


def test_config_error_is_for_flags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        build_datasets(run_config(), TOKENIZER, train=True)


RANK_PROGRAM = """
import sys, torch
from tests.data.test_datasets import TOKENIZER, build_datasets, build_eval_iterator, run_config, take
prefix, meeting, rank = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=int(rank), world_size=2)
dataset = build_datasets(run_config(data_path=(prefix,), split="1"), TOKENIZER, train=True).train
tokens = take(build_eval_iterator(dataset, micro_batch_size=4, dp_rank=0, dp_size=1), 5)
both = [torch.empty_like(tokens) for _ in range(2)]
torch.distributed.all_gather(both, tokens)
assert torch.equal(*both)
torch.distributed.destroy_process_group()
"""


def test_two_ranks_share_one_cache(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", 100)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK_PROGRAM, prefix, str(tmp_path / "meeting")]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE) for rank in range(2)]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()
    assert len(list((tmp_path / "cache").glob("*/*shuffle_index.npy"))) == 1
