"""One rank of four fails while the others train: it takes them down, and its reason is the only one printed."""

import os
import signal
import sys
from typing import Any

import pytest

from tests.bad_input.cases import BASE, PRETRAIN, Place, check_codes, snapshot
from tests.helpers.launch import Launch, launch

FAILING = 2
# With these every rank waits for rank 2 in a collective of its own, or for one that does.
LAYOUTS = {
    "data": "",
    "tensor and pipeline": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    "experts": "--expert-model-parallel-size 4",
}


def fail_at(where: str, how: str, rank: int = FAILING, grace: float | None = None) -> None:
    """Make one rank fail: at its second step (`step`), or while it opens its data (`data`).

    Args:
        where, how: see `fail`.
        rank: which one.
        grace: seconds for which the others wait to be ended.
    """
    if grace is not None:
        from megatron_moe.runtime import launch as product

        product.GRACE_SECONDS = grace
    if os.environ.get("RANK", "0") != str(rank):
        return
    from megatron_moe.training import loop

    name = {"step": "train_step", "data": "build_datasets"}[where]
    original, calls = getattr(loop, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if where == "data" or len(calls) == 2:
            fail(how)
        return original(*args, **kwargs)

    setattr(loop, name, failing)


def fail(how: str) -> None:
    """The ways in which a rank ends."""
    from megatron_moe.config.base import UserError

    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "gone":
        os._exit(7)
    if how == "mistake":
        raise UserError(f"--train-data-path here/only: no file here/only.idx on rank {FAILING}")
    if how == "bug":
        raise RuntimeError("a bug of rank 2")
    if how == "slow mistake":
        # The other ranks are told late, and wait in their collectives.
        import time

        time.sleep(2)
        fail("mistake")


def train(place: Place, where: str, how: str, layout: str = "", grace: float | None = None, **options: Any) -> Launch:
    words = place.fill(f"{BASE} {layout} --save {{tmp}}/new --train-iters 20").split()
    return launch(4, PRETRAIN, *words, prepare=(fail_at, where, how, FAILING, grace), **options)


MISTAKE = "error: --train-data-path here/only: no file here/only.idx on rank 2\n"


@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_mistake_of_one_rank_in_training(place: Place, layout: str) -> None:
    done = train(place, "step", "mistake", layout)
    assert done.stderr == MISTAKE
    check_codes(done)
    assert done.codes[FAILING] == 2


def test_mistake_while_the_others_have_been_waiting(place: Place) -> None:
    done = train(place, "step", "slow mistake", LAYOUTS["tensor and pipeline"])
    assert done.stderr == MISTAKE
    check_codes(done)


def test_file_that_only_one_rank_lacks(place: Place) -> None:
    assert place.data.is_dir()
    before = snapshot(place.folder)
    done = train(place, "data", "mistake")
    assert done.stderr == MISTAKE
    assert done.stdout == ""
    check_codes(done)
    assert snapshot(place.folder) == before


@pytest.mark.parametrize("layout", list(LAYOUTS.values()), ids=list(LAYOUTS))
def test_bug_of_one_rank(place: Place, layout: str) -> None:
    """Its traceback alone: not those of the ranks whose collectives break because of it."""
    done = train(place, "step", "bug", layout, agent_delay=1.0)
    assert done.stderr.count("Traceback") == 1
    assert done.stderr == done.ranks[FAILING].stderr
    assert done.stderr.splitlines()[-1] == "RuntimeError: a bug of rank 2"
    check_codes(done, 1)


@pytest.mark.parametrize(
    ("how", "layout"), [("gone", ""), *(("killed", layout) for layout in LAYOUTS.values())], ids=["gone", *LAYOUTS]
)
def test_rank_that_says_nothing(place: Place, layout: str, how: str) -> None:
    """Its end is the launcher's to tell (megatron_moe/torchrun.py does); the others keep quiet and leave."""
    done = train(place, "step", how, layout, agent_delay=1.0)
    assert done.stderr == ""
    assert done.codes[FAILING] == (-signal.SIGKILL if how == "killed" else 7)
    assert all(done.codes), done.codes


def test_rank_that_says_nothing_to_a_launcher_that_does_not_look(place: Place) -> None:
    """As on another node: a rank that has lost its connection waits a while to be ended, then says what it knows."""
    done = train(place, "step", "killed", grace=1.0, agent_delay=6.0)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: rank ")
    assert "lost its connection to another rank, which gave no reason: killed, or out of memory? (" in line
    assert line.endswith("); look for that rank's end, then go on with --load; --debug shows more")
    assert [code for rank, code in enumerate(done.codes) if rank != FAILING] == [1, 1, 1]


def test_everything_with_debug(place: Place) -> None:
    words = place.fill(f"{BASE} --train-iters 20 --debug").split()
    done = launch(4, PRETRAIN, *words, prepare=(fail_at, "step", "mistake"), agent_delay=1.0)
    assert "Traceback" in done.ranks[FAILING].stderr
    assert "here/only" in done.ranks[FAILING].stderr
    assert any("Traceback" in rank.stderr for number, rank in enumerate(done.ranks) if number != FAILING)


def different_bugs() -> None:
    """Every rank fails by itself, with a reason of its own."""
    from megatron_moe import pretrain

    sys.modules.pop("megatron_moe.pretrain")
    del pretrain
    from megatron_moe.config import validate

    def failing(*args: Any) -> None:
        raise RuntimeError(f"a bug of rank {os.environ['RANK']}")

    validate.validate = failing


def test_different_bugs_are_all_told(place: Place) -> None:
    """One traceback, and a line for each of the others that got as far as failing."""
    done = launch(4, PRETRAIN, *place.fill(BASE).split(), prepare=(different_bugs,), agent_delay=5.0)
    assert done.stderr.count("Traceback") == 1
    for rank in range(4):
        assert f"a bug of rank {rank}" in done.stderr
    assert done.stderr.count("also failed: RuntimeError: a bug of rank ") == 3
    assert done.codes == [1, 1, 1, 1]
