"""Streamed conversions: the same with any number of processes, resumable after any end, whole or invisible."""

import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_moe.checkpoint.convert import journal, stream
from megatron_moe.checkpoint.convert.blocks import Block, only_theirs, rename, split_rows
from megatron_moe.checkpoint.convert.engine import target_infos
from megatron_moe.checkpoint.convert.journal import unfinished_folder
from megatron_moe.checkpoint.convert.safetensors_files import SINGLE_FILE, SafetensorsSource, SafetensorsWriter
from megatron_moe.checkpoint.convert.stream import convert
from megatron_moe.checkpoint.convert.tensors import TensorSource
from megatron_moe.config.base import Resumable, UserError
from tests.helpers.tensors import DyingSource, MemorySource, SlowSource

COUNT = 40
OURS = {f"layer.{index}": torch.randn(40, 30, generator=torch.Generator().manual_seed(index)) for index in range(COUNT)}
BLOCKS: list[Block] = [
    block
    for index in range(COUNT)
    for block in split_rows(f"layer.{index}", (f"{index}.gate", f"{index}.up"), (20, 20), (30,))
]
THEIRS = {
    f"{index}.{name}": OURS[f"layer.{index}"][place]
    for index in range(COUNT)
    for name, place in (("gate", slice(20)), ("up", slice(20, 40)))
}
BYTES = COUNT * 40 * 30 * 4


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are many."""
    monkeypatch.setattr(stream, "_TASK_PIECES", 2)


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    """A file that stands for the source."""
    path = tmp_path / "origin"
    path.write_text("here")
    return path


def run(source: TensorSource, output: Path, origin: Path, blocks: list[Block] = BLOCKS, **options: Any) -> None:
    """Convert to safetensors files of a few tensors each."""
    dtype = options.pop("dtype", None)
    infos = target_infos(blocks, "theirs", source.infos, dtype)
    writer = SafetensorsWriter(unfinished_folder(output), infos, shard_bytes=20_000)
    finish: Callable[[Path], Any] = options.pop("finish", lambda folder: (folder / "config.json").write_text("{}"))
    convert(blocks, source, writer, output, inputs=[origin], finish=finish, **options)


def read(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def assert_whole(output: Path) -> None:
    assert not unfinished_folder(output).exists()
    found = read(output)
    assert found.keys() == THEIRS.keys()
    for name, tensor in THEIRS.items():
        assert torch.equal(found[name], tensor), name
    others = {path.name for path in output.iterdir() if path.suffix != ".safetensors"}
    assert others == {"config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_processes_writes_the_same(workers: int, tmp_path: Path, origin: Path) -> None:
    run(MemorySource(OURS), tmp_path / "out", origin, workers=workers)
    assert_whole(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    run(MemorySource(OURS), tmp_path / "empty", origin)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "empty" / path.name).read_bytes()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, origin: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"--output .*/out: is there already"):
        run(MemorySource(OURS), output, origin)
    assert (output / "thesis.txt").read_text() == "years of work"
    assert not unfinished_folder(output).exists()


def test_a_bad_map_writes_nothing(tmp_path: Path, origin: Path) -> None:
    with pytest.raises(UserError, match=r"origin: holds layer.0, which"):
        run(MemorySource(OURS), tmp_path / "out", origin, blocks=BLOCKS[2:])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin"]


def test_a_disk_that_is_too_small_is_refused_before(
    tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(journal.shutil, "disk_usage", lambda _: usage._replace(free=journal._SMALL_FILES + BYTES - 1))
    with pytest.raises(UserError, match=r"--output .*/out: needs 0.07 GB, but .* has 0.07 GB free; make room"):
        run(MemorySource(OURS), tmp_path / "out", origin)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin"]


def test_a_dead_worker_is_an_error_and_what_it_did_is_kept(tmp_path: Path, origin: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"a worker process died .*start the same again"):
        run(DyingSource(OURS, "layer.20"), output, origin, workers=2)
    assert not output.exists()
    source = MemorySource(OURS)
    run(source, output, origin, workers=1)
    assert_whole(output)
    assert source.numbers_read < COUNT * 40 * 30


def test_a_damaged_source_is_the_error_of_the_worker(tmp_path: Path) -> None:
    folder = tmp_path / "from"
    folder.mkdir()
    save_file(OURS, folder / SINGLE_FILE)
    source = SafetensorsSource(folder)
    (folder / SINGLE_FILE).write_bytes((folder / SINGLE_FILE).read_bytes()[: BYTES // 2])
    with pytest.raises(UserError, match=r"from/model.safetensors: cut short"):
        run(source, tmp_path / "out", folder, workers=2)
    assert not (tmp_path / "out").exists()


def _slowly(output: Path, origin: Path, note: Path) -> None:
    stream._TASK_PIECES = 2
    run(SlowSource(OURS, 0.05, note), output, origin, workers=2)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_conversion_that_was_killed_goes_on(signal_number: int, tmp_path: Path, origin: Path) -> None:
    output, note = tmp_path / "out", tmp_path / "note"
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_slowly, args=(output, origin, note))
    process.start()
    while not note.exists() or len(note.read_text().splitlines()) < 12:
        assert process.is_alive()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal_number)
    process.join(60)
    assert process.exitcode not in (0, None)
    assert not output.exists()
    workers = {int(line.split()[0]) for line in note.read_text().splitlines()}
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    source = MemorySource(OURS)
    run(source, output, origin, workers=1)
    assert_whole(output)
    # At most what both had in work, and what was handed out to them, is done again.
    assert source.numbers_read <= COUNT * 40 * 30 - 4 * 20 * 30


def _stop(_: Path) -> None:
    raise Resumable("stopped")


def _refuse(_: Path) -> None:
    raise UserError("differs")


def _full(_: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _take_the_name(folder: Path) -> None:
    output = folder.with_name("out")
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")


@pytest.mark.parametrize(
    ("finish", "kept"),
    [(_refuse, False), (_stop, True), (_full, True), (_take_the_name, True)],
    ids=["wrong", "not known", "full", "name taken"],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_left_when_the_end_fails(
    finish: Callable[[Path], None], kept: bool, resumed: bool, tmp_path: Path, origin: Path
) -> None:
    """Nothing, unless the weights are right."""
    output = tmp_path / "out"
    if resumed:
        with pytest.raises(UserError, match="stopped"):
            run(MemorySource(OURS), output, origin, finish=_stop)
    with pytest.raises(UserError):
        run(MemorySource(OURS), output, origin, finish=finish)
    assert unfinished_folder(output).exists() == kept
    shutil.rmtree(output, ignore_errors=True)
    source = MemorySource(OURS)
    run(source, output, origin)
    assert_whole(output)
    assert (source.numbers_read == 0) == kept


class _Wrong(MemorySource):
    """A source whose last tensor turns out to be damaged."""

    error: Exception = UserError("damaged")

    def read(self, box: Any) -> Tensor:
        if box.name == f"layer.{COUNT - 1}":
            raise self.error
        return super().read(box)


@pytest.mark.parametrize("error", [UserError("damaged"), Resumable("a process died"), MemoryError("none left")])
@pytest.mark.parametrize("resumed", [False, True])
def test_what_is_left_when_the_source_fails(
    error: Exception, resumed: bool, tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that another start may use; what an earlier one has written is not lost by a mistake in this one."""
    output = tmp_path / "out"
    source = _Wrong(OURS)
    if resumed:
        monkeypatch.setattr(_Wrong, "error", Resumable("a process died"))
        with pytest.raises(UserError, match="a process died"):
            run(source, output, origin)
    monkeypatch.setattr(_Wrong, "error", error)
    with pytest.raises(type(error), match=str(error)):
        run(source, output, origin)
    assert unfinished_folder(output).exists() == (resumed or type(error) is not UserError)


def test_what_cannot_be_used_is_removed_before_another_process_may_begin(
    tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, remove, held = tmp_path / "out", shutil.rmtree, []

    def noted(path: Path, **options: Any) -> None:
        with (path / journal._JOURNAL).open() as stream, pytest.raises(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(path)
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", noted)
    with pytest.raises(UserError, match="differs"):
        run(MemorySource(OURS), output, origin, finish=_refuse)
    assert held == [unfinished_folder(output)]
    assert not held[0].exists()


def test_no_file_of_an_earlier_start_is_published(tmp_path: Path, origin: Path) -> None:
    output = tmp_path / "out"

    def with_more(folder: Path) -> None:
        (folder / "LICENSE").write_text("of other options")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.model").write_text("of another model")
        (folder / "link").symlink_to(origin.parent)
        raise Resumable("stopped")

    with pytest.raises(UserError, match="stopped"):
        run(MemorySource(OURS), output, origin, finish=with_more)
    assert (unfinished_folder(output) / "LICENSE").exists()
    source = MemorySource(OURS)
    run(source, output, origin)
    assert source.numbers_read == 0
    assert_whole(output)
    assert origin.exists()


def test_a_changed_source_or_option_starts_anew(tmp_path: Path, origin: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match="stopped"):
        run(MemorySource(OURS), output, origin, finish=_stop)
    finished = MemorySource(OURS)
    with pytest.raises(UserError, match="stopped"):
        run(finished, output, origin, finish=_stop)
    assert finished.numbers_read == 0
    other = MemorySource(OURS)
    with pytest.raises(UserError, match="stopped"):
        run(other, output, origin, finish=_stop, dtype=torch.bfloat16)
    assert other.numbers_read == COUNT * 40 * 30
    assert {tensor.dtype for tensor in read(unfinished_folder(output)).values()} == {torch.bfloat16}
    (unfinished_folder(output) / "stale").mkdir()
    # Files of the same sizes, but of another source.
    for text in ("another", "a third"):
        origin.write_text(text)
        changed = MemorySource(OURS)
        with pytest.raises(UserError, match="stopped"):
            run(changed, output, origin, finish=_stop)
        assert changed.numbers_read == COUNT * 40 * 30
    run(MemorySource(OURS), output, origin)
    assert_whole(output)


def test_missing_files_start_anew(tmp_path: Path, origin: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match="stopped"):
        run(MemorySource(OURS), output, origin, finish=_stop)
    next(unfinished_folder(output).glob("*.safetensors")).unlink()
    run(MemorySource(OURS), output, origin)
    assert_whole(output)


def test_only_one_process_converts_into_a_folder(tmp_path: Path, origin: Path) -> None:
    output = tmp_path / "out"

    def again(_: Path) -> None:
        with pytest.raises(UserError, match="another process is converting into it"):
            run(MemorySource(OURS), output, origin)

    run(MemorySource(OURS), output, origin, finish=again)
    assert not unfinished_folder(output).exists()


def test_no_other_process_comes_between_the_last_number_and_the_name(
    tmp_path: Path, origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flushing takes as long as the disk does: whoever starts meanwhile must not take the folder for a stale one."""
    output, flush, tried = tmp_path / "out", journal._flush, []

    def again(path: Path) -> None:
        flush(path)
        if not tried:
            tried.append(path)
            with pytest.raises(UserError, match="another process is converting into it"):
                run(MemorySource(OURS), output, origin)

    monkeypatch.setattr(journal, "_flush", again)
    run(MemorySource(OURS), output, origin)
    assert tried
    assert_whole(output)


def test_a_link_to_an_empty_folder_is_no_new_folder(tmp_path: Path, origin: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    source = MemorySource(OURS)
    with pytest.raises(UserError, match=r"--output .*/out: is there already"):
        run(source, tmp_path / "out", origin)
    assert not source.numbers_read


def test_what_our_model_has_no_place_for_must_do_nothing(tmp_path: Path, origin: Path) -> None:
    """Only an import looks at it; the writer stands for one of our checkpoints."""
    blocks = [*rename("a", "x", (2,)), *only_theirs("bias", (2,))]
    source = MemorySource({"x": torch.ones(2), "bias": torch.ones(2)})
    writer = SafetensorsWriter(unfinished_folder(tmp_path / "out"), target_infos(blocks, "ours", source.infos))
    writer.side = "ours"
    with pytest.raises(UserError, match="bias: holds 1; our model has no such tensor"):
        convert(blocks, source, writer, tmp_path / "out", inputs=[origin], finish=lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["origin"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB, half of what is written."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk takes root, to mount a file system in memory")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up(workers: int, disk: Path, origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = disk / "out"
    with pytest.raises(UserError, match="GB free; make room"):
        run(MemorySource(OURS), output, origin, workers=workers)
    assert not list(disk.iterdir())
    # Somebody else's file, say, takes the room that was there.
    monkeypatch.setattr(stream, "check_room", lambda *_: None)
    with pytest.raises(UserError, match=r"cannot be written: No space left on device; make room, then start again"):
        run(MemorySource(OURS), output, origin, workers=workers)
    assert not output.exists()
    subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
    source = MemorySource(OURS)
    run(source, output, origin, workers=1)
    assert_whole(output)
    assert source.numbers_read < COUNT * 40 * 30
