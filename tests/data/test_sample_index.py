"""Sample indices on the disk: complete or not there, whoever is killed; damage is one line that says what to do."""

import errno
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_moe.config.base import UserError
from megatron_moe.data.datasets import build_datasets
from megatron_moe.data.indexed import open_indexed
from megatron_moe.data.indexed_writer import IndexedWriter
from megatron_moe.data.sample_stream import SampleStream
from tests.data.test_datasets import TOKENIZER, run_config, write

ARRAYS = ("document_index", "sample_index", "shuffle_index")


def train_stream(prefix: str, **flags: object) -> SampleStream:
    stream = build_datasets(run_config(data_path=(prefix,), split="1", **flags), TOKENIZER, train=True).train  # type: ignore[arg-type]
    assert stream is not None
    return stream


def tokens(stream: SampleStream) -> list[list[int]]:
    return [stream[position]["tokens"].tolist() for position in range(2 * stream.epoch_sizes[0] + 3)]


def folders(cache: Path, ending: str = "") -> list[Path]:
    return [path for path in cache.iterdir() if path.name.endswith(".tmp") == (ending == ".tmp")]


def test_an_index_is_written_once_and_read_again(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", 50)
    first = tokens(train_stream(prefix))
    (folder,) = (tmp_path / "cache").iterdir()
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert tokens(train_stream(prefix)) == first
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_what_the_order_depends_on_has_an_index_of_its_own(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", 200)
    for number, flags in enumerate(({}, {"seq_length": 8}), start=1):
        train_stream(prefix, **flags)
        assert len(folders(tmp_path / "cache")) == number
    build_datasets(run_config(data_path=(prefix,), split="8,2"), TOKENIZER, train=True, valid=True)
    assert len(folders(tmp_path / "cache")) == 4


@pytest.mark.parametrize("empty", [False, True], ids=["whole", "with empty documents"])
def test_sentences_of_a_document_stay_together(tmp_path: Path, empty: bool) -> None:
    """megatron-core would shuffle them like documents."""
    lengths = np.random.default_rng(3).integers(1, 40, 60).astype(np.int32)
    sentences = [[1, length - 1] if length > 1 and place % 3 else [length] for place, length in enumerate(lengths)]
    counts = np.array([count for row in sentences for count in ([len(row), 0] if empty else [len(row)])], np.int32)
    ids = (np.arange(lengths.sum()) % 90).astype(np.uint16)
    for name, columns in (
        ("a", (lengths, None)),
        ("b", (np.array([length for row in sentences for length in row]), counts)),
    ):
        (tmp_path / name).mkdir()
        with IndexedWriter(tmp_path / name / "pair", ids.dtype) as writer:
            writer.add(ids, *columns)
    whole, divided = (train_stream(str(tmp_path / name / "pair")) for name in "ab")
    assert tokens(divided) == tokens(whole)
    # As a copy in a loader's process.
    (epoch,) = divided._epochs
    copy = pickle.loads(pickle.dumps(epoch.dataset))
    assert [copy[index].tolist() for index in range(60)] == [
        open_indexed(tmp_path / "b" / "pair").document(index).tolist() for index in range(60)
    ]


KILLED_PROGRAM = """
import os, signal, sys
import numpy
from tests.data.test_sample_index import train_stream
save, left = numpy.save, int(sys.argv[2])
def save_half(path, array, **options):
    global left
    save(path, array, **options)
    left -= 1
    if left == 0:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
numpy.save = save_half
train_stream(sys.argv[1])
"""


@pytest.mark.parametrize("array", range(len(ARRAYS)), ids=ARRAYS)
def test_a_run_killed_while_it_writes_does_no_harm(tmp_path: Path, array: int) -> None:
    prefix = write(tmp_path / "a", 50)
    expected = tokens(train_stream(prefix, data_cache_path=str(tmp_path / "other")))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED_PROGRAM, prefix, str(array + 1)]
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert len(folders(tmp_path / "cache", ".tmp")) == 1
    assert folders(tmp_path / "cache") == []
    assert tokens(train_stream(prefix)) == expected


@pytest.mark.parametrize("array", ARRAYS)
@pytest.mark.parametrize("size", ["none", "empty", "half", "other"])
def test_a_damaged_index_is_one_line_and_its_cure_works(tmp_path: Path, array: str, size: str) -> None:
    prefix = write(tmp_path / "a", 50)
    expected = tokens(train_stream(prefix))
    (folder,) = folders(tmp_path / "cache")
    (path,) = folder.glob(f"*{array}.npy")
    if size == "none":
        path.unlink()
    elif size == "other":
        path.write_bytes(b"not numpy" * 50)
    else:
        os.truncate(path, 0 if size == "empty" else path.stat().st_size // 2)
    with pytest.raises(UserError, match=f"^{folder}: damaged sample index of .*delete the folder") as caught:
        train_stream(prefix)
    assert "\n" not in str(caught.value)
    for entry in folder.iterdir():
        entry.unlink()
    folder.rmdir()
    assert tokens(train_stream(prefix)) == expected


def test_an_index_that_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    prefix = write(tmp_path / "a", 50)
    train_stream(prefix)
    (path,) = folders(tmp_path / "cache")[0].glob("*shuffle_index.npy")
    np.save(path, np.load(path)[:-1])
    with pytest.raises(UserError, match="damaged sample index"):
        train_stream(prefix)


def test_an_index_that_only_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody should delete a good one because too many files are open."""

    def no_more_files(_path: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    prefix = write(tmp_path / "a", 50)
    train_stream(prefix)
    monkeypatch.setattr("megatron_moe.data.sample_index.check_array_file", no_more_files)
    with pytest.raises(UserError, match=r"cannot be read: Too many open files; raise it with ulimit -n"):
        train_stream(prefix)


def test_a_node_that_does_not_see_the_index_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "a", 50)
    # What another rank than the first does: it writes nothing.
    monkeypatch.setattr("megatron_moe.data.datasets.write_index", lambda *_: None)
    with pytest.raises(UserError, match=r"--data-cache-path .*: rank 0 wrote .*all nodes must share that folder"):
        train_stream(prefix)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    prefix = write(tmp_path / "a", 50)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"--data-cache-path .*cache: cannot write there: No space left on device"):
        train_stream(prefix)
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_runs_may_write_the_same_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one uses what the faster one wrote."""
    prefix = write(tmp_path / "a", 50)
    save = np.save
    faster: list[list[list[int]]] = []

    def save_after_another_run(*args: object, **options: object) -> None:
        monkeypatch.setattr(np, "save", save)
        faster.append(tokens(train_stream(prefix)))
        save(*args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(np, "save", save_after_another_run)
    assert tokens(train_stream(prefix)) == faster[0]
    assert len(list((tmp_path / "cache").iterdir())) == 1
