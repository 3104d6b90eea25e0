"""Fuzzing with a bound: how many examples, damaged bytes of valid files, and a child that may crash or eat memory.

`make test` tries the same examples each time, a few seconds a reader. Longer, with others every time:

    MEGATRON_MOE_FUZZ=100 .venv/bin/python -m pytest tests/fuzz -p no:xdist
"""

import multiprocessing
import os
import resource
import signal
import struct
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megatron_moe.config.base import UserError

TIMES = int(os.environ.get("MEGATRON_MOE_FUZZ", "1"))
EXAMPLE_SECONDS = 20

# Numbers at which readers break.
EDGES = [
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**61,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
]


def examples(count: int) -> settings:
    """Settings of a bounded fuzz test: `count` examples, times MEGATRON_MOE_FUZZ."""
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def damaged(valid: bytes, header: int = 64) -> st.SearchStrategy[bytes]:
    """Variants of a valid file, or bytes of any kind; the first `header` bytes are hit most often."""
    place = st.one_of(st.integers(0, min(header, len(valid)) - 1), st.integers(0, len(valid) - 1))
    change = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("byte"), place, st.integers(0, 255)),
        st.tuples(st.just("word"), place, st.sampled_from(EDGES)),
        st.tuples(st.just("cut"), place, st.integers(0, 64)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("copy"), place, place),
        st.tuples(st.just("end"), place, st.just(0)),
        st.tuples(st.just("append"), st.just(0), st.binary(min_size=1, max_size=64)),
    )
    several = st.lists(change, min_size=1, max_size=4).map(lambda changes: apply(valid, changes))
    return st.one_of(several, several, several, st.binary(max_size=200))


def apply(data: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    """`data` after some changes."""
    content = bytearray(data)
    for kind, place, value in changes:
        place = min(place, max(0, len(content) - 1))
        if kind == "flip" and content:
            content[place] ^= 1 << value
        elif kind == "byte" and content:
            content[place] = value
        elif kind == "word":
            content[place : place + 8] = struct.pack("<Q", value)[: len(content) - place]
        elif kind == "cut":
            del content[place : place + value]
        elif kind == "insert":
            content[place:place] = value
        elif kind == "copy":
            content[place:place] = content[value : value + 32]
        elif kind == "end":
            del content[place:]
        elif kind == "append":
            content += value
    return bytes(content)


def check_message(error: UserError) -> None:
    """A mistake must be one line that a screen takes."""
    assert len(str(error).splitlines()) == 1, str(error)
    assert len(str(error)) < 1500, len(str(error))


class Guard:
    """Inside a child: notes the example that is tried, and stops one that takes too long."""

    def __init__(self, note: Path) -> None:
        self._note = note

    def limit_memory(self, megabytes: int = 700) -> None:
        """From here on the process may take so much more; called once everything is imported."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + megabytes * (1 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def start(self, example: bytes | str) -> None:
        """The next example begins."""
        self._note.write_bytes(example if isinstance(example, bytes) else example.encode("utf-8", "surrogatepass"))
        # The default action ends the process, also inside a C++ library that never returns to Python.
        signal.alarm(EXAMPLE_SECONDS)


def in_child(function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Run a fuzz test `function(guard, folder, *args)` in a process of its own, which may crash.

    Raises:
        AssertionError: it failed, crashed, or an example took too long; the message names the example.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.preload"])
    ours, theirs = context.Pipe()
    note = folder / "example"
    process = context.Process(target=_child, args=(theirs, function, folder, note, args))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        process.join()
        kept = note.read_bytes() if note.exists() else b""
        raise AssertionError(f"the process ended with {process.exitcode} at {kept[:2000]!r}") from None
    finally:
        ours.close()
    process.join()
    assert answer is None, answer


def _child(
    result: Connection,
    function: Callable[..., None],
    folder: Path,
    note: Path,
    args: tuple[Any, ...],
) -> None:
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Messages of third parties, one an example.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        function(Guard(note), folder, *args)
        answer = None
    except BaseException:  # noqa: BLE001  # whatever it is, the parent must hear of it
        answer = traceback.format_exc()
    signal.alarm(0)
    result.send(answer)
    os._exit(0)
