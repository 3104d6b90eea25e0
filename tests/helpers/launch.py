"""Starts an entry point on real ranks as torchrun does, and keeps what each of them printed and how it ended.

torchrun itself costs some ten seconds of imports a start; here ranks are forked from the server of
tests/helpers/distributed.py. What torchrun's agent does for them is done by the test: it hosts the store, sets the
environment, and ends the other ranks as soon as one has failed.
"""

import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.helpers.distributed import CONTEXT, PRELOADED

ROOT = Path(__file__).parents[2]
# As torchrun: torch/distributed/elastic/agent/server/local_elastic_agent.py, `_shutdown`.
SECONDS_FROM_TERM_TO_KILL = 30
SECONDS_BETWEEN_LOOKS = 0.1
TIMEOUT_SECONDS = 120
Prepare = Callable[..., None]


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended: exit code, negative for a signal, and what it printed."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Launch:
    """How all ranks ended."""

    ranks: list[RankEnd]
    seconds: float
    """From the first rank that failed to the last that ended; 0 if none failed."""

    @property
    def codes(self) -> list[int]:
        """Exit codes in rank order."""
        return [rank.code for rank in self.ranks]

    @property
    def stdout(self) -> str:
        """What all ranks printed, in rank order."""
        return "".join(rank.stdout for rank in self.ranks)

    @property
    def stderr(self) -> str:
        """What all ranks printed as errors, in rank order."""
        return "".join(rank.stderr for rank in self.ranks)


def launch(
    world_size: int,
    program: str,
    *words: object,
    environment: Mapping[str, str] | None = None,
    prepare: tuple[Any, ...] = (),
    agent_delay: float = SECONDS_BETWEEN_LOOKS,
    timeout: float = TIMEOUT_SECONDS,
) -> Launch:
    """Run `python -m program words` (or `python program.py words`) on `world_size` ranks until all have ended.

    One rank is started as a user starts it, without a launcher's environment.

    Args:
        world_size: ranks.
        program: a module with a `__main__` part, or a script's path from the root of the repository.
        words: the command line.
        environment: variables on top of those of torchrun.
        prepare: an importable function and its arguments, called on every rank before the program starts.
        agent_delay: seconds until the others are ended after one has failed.
        timeout: seconds after which ranks that still run count as hanging.

    Raises:
        AssertionError: ranks hung.
    """
    from torch.distributed import TCPStore

    CONTEXT.set_forkserver_preload(PRELOADED)
    variables = dict(environment or {})
    store = None
    if world_size > 1:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        variables = agent_environment(world_size, store.port) | variables
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            output = Path(folder) / str(rank)
            line = [program, *map(str, words)]
            process = CONTEXT.Process(target=_rank, args=(line, own | variables, output, prepare, os.getcwd()))
            process.start()
            processes.append(process)
        seconds, hung = _agent(processes, agent_delay, timeout)
        ranks = [
            RankEnd(process.exitcode or 0, _read(Path(folder) / f"{rank}.out"), _read(Path(folder) / f"{rank}.err"))
            for rank, process in enumerate(processes)
        ]
    del store
    done = Launch(ranks, seconds)
    assert not hung, f"ranks {hung} did not end:\n{done.stdout}\n{done.stderr}"
    return done


def agent_environment(world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for every rank (torch/distributed/elastic/agent/server/local_elastic_agent.py)."""
    return {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }


def _agent(processes: Sequence[Any], delay: float, timeout: float) -> tuple[float, list[int]]:
    """Wait for all ranks, and end the others when one fails. Returns the time that took, and who had to be killed."""
    running = {process.sentinel: process for process in processes}
    deadline = time.monotonic() + timeout
    failed_at = 0.0
    while running and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait(list(running), left):
            process = running.pop(sentinel)  # type: ignore[call-overload]
            process.join()
            if process.exitcode and not failed_at:
                failed_at = time.monotonic()
                deadline = failed_at + SECONDS_FROM_TERM_TO_KILL
                if running:
                    time.sleep(delay)
                for other in running.values():
                    other.terminate()
    ended_at = time.monotonic()
    hung = [rank for rank, process in enumerate(processes) if process in running.values()]
    for process in running.values():
        process.kill()
        process.join()
    return ended_at - failed_at if failed_at else 0.0, hung


def _rank(line: list[str], environment: dict[str, str], output: Path, prepare: tuple[Any, ...], folder: str) -> None:
    """Become the program: its own output, environment and words."""
    for number, ending in ((1, ".out"), (2, ".err")):
        descriptor = os.open(output.with_suffix(ending), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(folder)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    if prepare:
        function, *arguments = prepare
        function(*arguments)
    program, *words = line
    if program.endswith(".py"):
        sys.argv = [str(ROOT / program), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        # run_module replaces the first by the module's path.
        sys.argv = ["-m", *words]
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
