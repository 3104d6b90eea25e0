"""What the tests of wrong input share: a place with real files that a case damages, and what must hold when it is run.

A case is a command line that must be refused. The same is checked of each, on 1 and on 4 ranks: exactly one line is
printed by all ranks together, no rank ends well, none hangs, and no file is made, changed or lost.
"""

import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launch import Launch, launch

PRETRAIN = "megatron_moe.pretrain"
MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --num-experts 4 8 --expert-interval 2 "
    "--mlp-type residual --attention-dropout 0 --hidden-dropout 0"
)
TRAINING = (
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 2 --eval-interval 0 --lr 1e-2 --lr-decay-style constant "
    "--no-tensorboard --device cpu"
)
DATA = "--train-data-path {data}/train --tokenizer-model {data}/bpe.model --data-cache-path {cache}"
BASE = f"{MODEL} {TRAINING} {DATA}"


@dataclass(frozen=True)
class Originals:
    """Files that no test changes: a folder of token files with its tokenizers, a finished run, a cache of indices."""

    data: Path
    run: Path
    cache: Path


@dataclass(frozen=True)
class Place:
    """A test's own folder. `data` and `run` are copies, made when they are asked for."""

    folder: Path
    originals: Originals

    @cached_property
    def data(self) -> Path:
        """Token files `train` and `valid`, `bpe.model`, and tokenizers of other vocabularies."""
        return Path(shutil.copytree(self.originals.data, self.folder / "data"))

    @cached_property
    def run(self) -> Path:
        """A run's folder with a checkpoint at step 2."""
        return Path(shutil.copytree(self.originals.run, self.folder / "run"))

    @property
    def checkpoint(self) -> Path:
        """That checkpoint."""
        return self.run / "iter_0000002"

    def fill(self, text: str) -> str:
        """Put paths where `{data}`, `{run}`, `{tmp}` and `{cache}` stand."""
        for name in ("data", "run"):
            if f"{{{name}}}" in text:
                text = text.replace(f"{{{name}}}", str(getattr(self, name)))
        return text.replace("{tmp}", str(self.folder)).replace("{cache}", str(self.originals.cache))


@dataclass(frozen=True)
class Case:
    """A command line that must be refused.

    Attributes:
        name: what is wrong.
        words: added to those of a run that works; the later of two equal flags counts.
        line: what must be printed after `error: `, to the letter; `{world}` is the number of ranks.
        damage: what is done to the place before.
        base: words of the run that works.
        program: the entry point.
        on_one: added on 1 rank, where the layout of 4 is to be refused as well.
        environment: variables that are set on every rank.
    """

    name: str
    words: str
    line: str
    damage: Callable[[Place], Any] | None = None
    base: str = BASE
    program: str = PRETRAIN
    on_one: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def on_ranks(cases: list[Case]) -> Any:
    """Parametrize a test with every case on 1 and on 4 ranks."""
    return pytest.mark.parametrize(
        ("case", "world_size"),
        [pytest.param(case, size, id=f"{case.name}-{size}") for case in cases for size in (1, 4)],
    )


def check_refused(case: Case, world_size: int, place: Place) -> Launch:
    """Run a case, and check all that must hold of it."""
    words = f"{case.base} {case.words} {case.on_one if world_size == 1 else ''}".split()
    words = [place.fill(word) for word in words]
    line = place.fill(case.line).replace("{world}", str(world_size))
    if case.damage is not None:
        case.damage(place)
    before = snapshot(place.folder)
    done = launch(world_size, case.program, *words, environment=case.environment)
    assert done.stderr == f"error: {line}\n"
    assert done.stdout == ""
    check_codes(done)
    assert snapshot(place.folder) == before
    return done


def check_codes(done: Launch, code: int = 2) -> None:
    """Every rank ended with `code`, or was ended by the agent; one at least did the first."""
    assert code in done.codes
    assert set(done.codes) <= {code, -signal.SIGTERM, 128 + signal.SIGTERM}, done


def snapshot(folder: Path) -> dict[str, str]:
    """Every path under a folder, with a hash of what a file holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[os.fspath(path.relative_to(folder))] = content
    return found


def cut(path: Path, share: float = 0.5) -> None:
    """Keep only the first part of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
