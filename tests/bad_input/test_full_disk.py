"""Full disks: one line, and what was written before stays.

A disk is a file system in memory of a given size, mounted for the test. Where mounting is not allowed (it takes root),
a limit on the size of files stands in (RLIMIT_FSIZE): the same calls fail, with `File too large` in place of `No space
left on device`, and what takes more than one file is left out.
"""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bad_input.cases import BASE, PRETRAIN, Place, check_codes, snapshot
from tests.helpers.launch import launch

CHECKPOINT_BYTES = 2_800_000
FULL = "No space left on device"
ROOM = "make room, then start again"


def mount(folder: Path, size: int) -> bool:
    """Whether a file system of `size` bytes lies at `folder` now."""
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(place: Place, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of as many bytes as the test's parameter says."""
    folder = place.folder / "disk"
    if not mount(folder, request.param):
        pytest.skip("a small disk takes root, to mount a file system in memory; test_file_size_limit does without")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def limit_files(size: int, rank: int | None = None) -> None:
    """No file may grow beyond `size` bytes; on one rank only, if it is given. Python ignores SIGXFSZ."""
    if rank is None or os.environ.get("RANK", "0") == str(rank):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("disk", [2 * CHECKPOINT_BYTES], indirect=True, ids=["disk"])
def test_second_checkpoint(disk: Path, place: Place, world_size: int) -> None:
    """The first one stays as it is, nothing half-written stays, and the run goes on from it where there is room."""
    words = place.fill(f"{BASE} --save {disk}/run --load {disk}/run --save-interval 1").split()
    done = launch(world_size, PRETRAIN, *words)
    assert done.stderr == (
        f"error: --save {disk}/run: the checkpoint of step 2 cannot be written (that of step 1 is kept): {FULL}; make "
        f"room, then go on with --load {disk}/run\n"
    )
    check_codes(done)
    assert sorted(path.name for path in (disk / "run").glob("iter*")) == ["iter_0000001"]
    assert (disk / "run" / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "1\n"
    run = shutil.copytree(disk / "run", place.folder / "roomy")
    words = place.fill(f"{BASE} --save {run} --load {run}").split()
    again = launch(world_size, PRETRAIN, *words)
    assert again.codes == [0] * world_size, again.stderr
    assert "resumed at step 1" in again.stdout


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("disk", [24_000], indirect=True, ids=["disk"])
def test_metrics(disk: Path, place: Place, world_size: int) -> None:
    """The disk fills before a checkpoint is due; which of the two files needs the next page depends on their rows."""
    words = place.fill(f"{BASE} --save {disk}/run --train-iters 200").split()
    done = launch(world_size, PRETRAIN, *words)
    file = "expert_load" if "expert_load" in done.stderr else "metrics"
    assert done.stderr == f"error: {disk}/run/{file}.jsonl: cannot be written: {FULL}; {ROOM}\n"
    check_codes(done)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("disk", [4096], indirect=True, ids=["disk"])
def test_first_files_of_a_run(disk: Path, place: Place, world_size: int) -> None:
    words = place.fill(f"{BASE} --save {disk}/run").split()
    done = launch(world_size, PRETRAIN, *words)
    assert done.stderr == f"error: {disk}/run/config.yaml: cannot be written: {FULL}; {ROOM}\n"
    check_codes(done)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("disk", [8192], indirect=True, ids=["disk"])
def test_cache_of_indices(disk: Path, place: Place, world_size: int) -> None:
    words = place.fill(f"{BASE} --data-cache-path {disk}/cache --save {{tmp}}/run").split()
    done = launch(world_size, PRETRAIN, *words)
    assert done.stderr == f"error: --data-cache-path {disk}/cache: cannot write there: {FULL}\n"
    check_codes(done)
    assert not any((disk / "cache").iterdir())
    assert not (place.folder / "run").exists()


@pytest.mark.parametrize("disk", [8192], indirect=True, ids=["disk"])
def test_preprocessing(disk: Path, place: Place) -> None:
    """It is one process, whatever the ranks. An earlier pair of that name stays."""
    for name in ("train.bin", "train.idx"):
        (disk / name).write_bytes(b"earlier")
    before = snapshot(disk)
    words = place.fill(
        f"--input {{data}}/train.jsonl --output-prefix {disk}/train --tokenizer-model {{data}}/bpe.model"
    )
    done = launch(1, "tools/preprocess_data.py", *words.split())
    assert done.stderr == f"error: {disk}/train.bin: cannot be written: {FULL}; {ROOM}\n"
    check_codes(done)
    assert snapshot(disk) == before


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("disk", [8192], indirect=True, ids=["disk"])
def test_scores(disk: Path, place: Place, world_size: int) -> None:
    (disk / "out.jsonl").write_text("earlier\n", encoding="utf-8")
    (place.folder / "in.jsonl").write_text('{"text": "今天北京的天气很好"}\n' * 40, encoding="utf-8")
    words = place.fill(f"--load {{run}} --input {{tmp}}/in.jsonl --output {disk}/out.jsonl --device cpu").split()
    done = launch(world_size, "megatron_moe.score", *words)
    assert done.stderr == f"error: --output {disk}/out.jsonl: cannot be written: {FULL}; {ROOM}\n"
    check_codes(done)
    assert snapshot(disk).keys() == {"out.jsonl"}
    assert (disk / "out.jsonl").read_text(encoding="utf-8") == "earlier\n"


@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (4, 0), (4, 2)])
def test_file_size_limit(place: Place, world_size: int, rank: int) -> None:
    """Only one rank's disk is full. The run it goes on from stays as it is, byte for byte."""
    before = snapshot(place.run / "iter_0000002")
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2" if world_size == 4 else ""
    words = place.fill(f"{BASE} --load {{run}} --save {{run}} --train-iters 3 {layout}").split()
    done = launch(world_size, PRETRAIN, *words, prepare=(limit_files, 100_000, rank))
    assert done.stderr == place.fill(
        "error: --save {run}: the checkpoint of step 3 cannot be written (that of step 2 is kept): File too large; "
        "mend that, then go on with --load {run}\n"
    )
    check_codes(done)
    assert snapshot(place.run / "iter_0000002") == before
    assert not list(place.run.glob("*3*"))
