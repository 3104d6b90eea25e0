"""Every sample id that training reads: none twice in an epoch, none skipped, in the order of one uninterrupted run.

Real ranks train through the real Trainer; the corpus is written so that the tokens of a sample name it.
"""

import contextlib
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.config.run import RunConfig
from megatron_moe.data.indexed_writer import IndexedWriter
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import tiny_run
from tests.helpers.training import build_trainer, record_curve

SEQ, VOCABULARY = 8, 64
# Documents of every file. Each is as long as a sample and so is one, but for the last in the shuffled order: its
# labels would need one more token.
CORPORA = {"one file": (21,), "blend": (13, 8, 5)}
WEIGHTS = ("0.5", "0.3", "0.2")
# Samples of the longest run: more than three epochs of every file.
LONGEST = 96

# Which document, as (file, number).
Id = tuple[int, int]


@dataclass
class Reading:
    """What one rank's forward passes read."""

    data_rank: int
    data_size: int
    chunks: list[list[list[Id]]]
    """Per virtual pipeline chunk, per micro-batch."""
    consumed: int
    """Samples that all ranks have consumed, by the trainer's own count, from the start of the first run."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Data flags of every corpus."""
    flags: dict[str, dict[str, Any]] = {}
    for name, sizes in CORPORA.items():
        folder = tmp_path_factory.mktemp("corpus")
        for file, size in enumerate(sizes):
            with IndexedWriter(folder / str(file), np.dtype(np.uint16)) as writer:
                for number in range(size):
                    tokens = np.full(SEQ, VOCABULARY - 1, np.uint16)
                    tokens[:2] = file, number
                    writer.add(tokens, np.array([SEQ], np.int32))
        prefixes = [str(folder / str(file)) for file in range(len(sizes))]
        words = tuple(word for pair in zip(WEIGHTS, prefixes, strict=False) for word in pair)
        flags[name] = {
            "train_data_path": words if len(sizes) > 1 else tuple(prefixes),
            "tokenizer_type": "NullTokenizer",
            "vocab_size": VOCABULARY,
            "seq_length": SEQ,
        }
    return flags


def record(run: RunConfig) -> Reading:
    """Train on this rank and remember every micro-batch as it is taken."""
    from megatron.core import parallel_state

    from megatron_moe.training import loop

    build, chunks = loop.build_data_iterator, []

    def recording(*args: Any, **options: Any) -> Iterator[dict[str, Any]]:
        chunks.append([])
        return remember(build(*args, **options), chunks[-1])

    def remember(batches: Iterator[dict[str, Any]], taken: list[list[Id]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            taken.append([(file, number) for file, number in batch["tokens"][:, :2].tolist()])
            yield batch

    loop.build_data_iterator = recording
    trainer = build_trainer(run)
    record_curve(trainer)
    return Reading(
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_data_parallel_world_size(),
        chunks,
        trainer.progress.consumed_samples,
    )


def in_order(readings: list[Reading]) -> list[Id]:
    """What all ranks read together: micro-batch by micro-batch, by data-parallel rank.

    Ranks with the same share, and all their chunks, must have read the same.
    """
    size = readings[0].data_size
    shares: list[list[list[Id]]] = []
    for rank in range(size):
        copies = [chunk for reading in readings if reading.data_rank == rank for chunk in reading.chunks]
        assert copies
        assert all(copy == copies[0] for copy in copies)
        shares.append(copies[0])
    assert len({len(share) for share in shares}) == 1
    return [sample for turn in zip(*shares, strict=True) for micro_batch in turn for sample in micro_batch]


def epochs_of(file: int, stream: list[Id], samples: int) -> list[list[int]]:
    """The documents of one file in the order in which they come, cut into epochs."""
    numbers = [number for owner, number in stream if owner == file]
    return [numbers[start : start + samples] for start in range(0, len(numbers), samples)]


@pytest.fixture(scope="module")
def uninterrupted(corpora: dict[str, dict[str, Any]]) -> dict[str, list[Id]]:
    """Ids that one rank reads in one run."""
    streams = {}
    for name, flags in corpora.items():
        run = tiny_run(**flags, train_iters=LONGEST // 8)
        readings = run_ranks(1, record, run)
        streams[name] = in_order(readings)
        assert len(streams[name]) == readings[0].consumed == LONGEST
    return streams


@pytest.mark.parametrize("corpus", CORPORA)
def test_every_epoch_holds_every_sample_once_in_another_order(uninterrupted: dict[str, list[Id]], corpus: str) -> None:
    for file, documents in enumerate(CORPORA[corpus]):
        epochs = epochs_of(file, uninterrupted[corpus], documents - 1)
        assert len(epochs) > 3
        read = set(epochs[0])
        assert len(read) == documents - 1
        assert all(set(epoch) == read and len(epoch) == len(read) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert set(epochs[-1]) <= read
        assert all(one != other for one, other in itertools.pairwise(epochs))


def test_blended_files_take_their_turns_by_weight(uninterrupted: dict[str, list[Id]]) -> None:
    for file, weight in enumerate(WEIGHTS):
        for read in range(1, LONGEST + 1):
            count = sum(owner == file for owner, _ in uninterrupted["blend"][:read])
            assert abs(count - float(weight) * read) <= 1


RAMP = {"rampup_batch_size": (2, 2, 30), "micro_batch_size": 2}
TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT = "expert_model_parallel_size"
INTERLEAVED = {PIPELINE: 2, "num_layers_per_virtual_pipeline_stage": 1}
STOP = {"train_iters": 12, "exit_duration_in_mins": 1e-9}
# Runs one after the other, each resumed from the one before: (ranks, flags). --train-iters counts from the start of
# the first. Without other flags a step takes 8 samples in micro-batches of 2.
CASES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "data-parallel": [(4, {"train_iters": 12, "micro_batch_size": 1})],
    "more iterations after each end": [(1, {"train_iters": 1}), (1, {"train_iters": 4}), (1, {"train_iters": 12})],
    "stopped by the clock": [(2, STOP), (2, STOP), (2, {"train_iters": 12})],
    "another micro-batch": [(1, {"train_iters": 5, "micro_batch_size": 4}), (1, {"train_iters": 12})],
    "another global batch": [
        (1, {"train_iters": 3}),
        (1, {"train_iters": 6, "global_batch_size": 12, "micro_batch_size": 3}),
        (2, {"train_iters": 15, "global_batch_size": 4}),
    ],
    "ramp-up": [(1, {**RAMP, "train_iters": 15})],
    "ramp-up resumed in the ramp": [
        (1, {**RAMP, "train_iters": 3}),
        (1, {**RAMP, "train_iters": 5}),
        (1, {**RAMP, "train_iters": 15}),
    ],
    "ramp-up resumed on more ranks": [
        (1, {**RAMP, "train_iters": 4}),
        (2, {**RAMP, "micro_batch_size": 1, "train_iters": 15}),
    ],
    "1 rank, 4 ranks, 2 ranks": [
        (1, {"train_iters": 4}),
        (4, {"train_iters": 8}),
        (2, {"train_iters": 12}),
    ],
    "tensor, pipeline, expert parallel": [
        (4, {"train_iters": 3, TENSOR: 2}),
        (2, {"train_iters": 6, PIPELINE: 2}),
        (4, {"train_iters": 9, EXPERT: 2, "micro_batch_size": 1}),
    ],
    "virtual pipeline chunks": [(2, {"train_iters": 5, **INTERLEAVED}), (4, {"train_iters": 12, **INTERLEAVED})],
    "loader processes": [(2, {"train_iters": 4, "num_workers": 2}), (1, {"train_iters": 12, "num_workers": 2})],
}


# The blend has several epochs of several files; a single file takes another path through the code.
ON_ONE_FILE = ("data-parallel", "more iterations after each end", "ramp-up resumed in the ramp")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "corpus"), [*((case, "blend") for case in CASES), *((case, "one file") for case in ON_ONE_FILE)]
)
def test_resumed_runs_read_what_one_run_reads(
    corpora: dict[str, dict[str, Any]], uninterrupted: dict[str, list[Id]], tmp_path: Path, case: str, corpus: str
) -> None:
    read: list[Id] = []
    for ranks, flags in CASES[case]:
        resume = {"load": str(tmp_path)} if read else {}
        readings = run_ranks(ranks, record, tiny_run(**corpora[corpus], save=str(tmp_path), **flags, **resume))
        read += in_order(readings)
        assert {reading.consumed for reading in readings} == {len(read)}
    assert len(read) > 60
    assert read == uninterrupted[corpus][: len(read)]


def test_ranks_shares_are_disjoint(corpora: dict[str, dict[str, Any]]) -> None:
    """Within an epoch no two data-parallel ranks read the same sample."""
    readings = run_ranks(2, record, tiny_run(**corpora["one file"], train_iters=2))
    first, second = ({sample for batch in reading.chunks[0] for sample in batch} for reading in readings)
    assert len(first) == len(second) == 8
    assert not first & second


def printed(run: RunConfig) -> str:
    """What a run prints while it is built."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        trainer = build_trainer(run)
    record_curve(trainer)
    return out.getvalue()


def test_other_data_is_told_of(corpora: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """A position in other data is no position in this: the run goes on, and says so."""
    flags = corpora["blend"] | {"save": str(tmp_path), "train_iters": 1}
    assert run_ranks(1, printed, tiny_run(**flags)) == [""]
    flags |= {"load": str(tmp_path)}
    assert run_ranks(1, printed, tiny_run(**flags | {"train_iters": 2})) == [""]
    flags |= {"train_data_path": ("0.9", *flags["train_data_path"][1:])}
    (told,) = run_ranks(1, printed, tiny_run(**flags | {"train_iters": 3}))
    assert told.startswith("other data than before: weights (0.5 before, 0.642857 now); the run goes on at sample 16 ")
    (told,) = run_ranks(1, printed, tiny_run(**flags | {"train_iters": 4, "seed": 7}))
    assert told.startswith("other data than before: --seed (1234 before, 7 now); the run goes on at sample 24 ")
