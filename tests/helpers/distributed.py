"""Starts real gloo ranks for a test and returns what each of them computed.

Ranks are forked from a server process that has torch and megatron-core imported already, so that a test with four
ranks costs about a second to start rather than ten.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["tests.helpers.preload"]
TIMEOUT_SECONDS = 120


class RankFailure(AssertionError):
    """A rank raised; the message is its traceback."""


def run_ranks[T](
    world_size: int, function: Callable[..., T], *args: Any, timeout_seconds: float = TIMEOUT_SECONDS
) -> list[T]:
    """Run `function(*args)` on `world_size` ranks and return their results in rank order.

    The function starts its process groups itself (`megatron_moe.runtime.distributed.start`), as an entry point does;
    it must be importable, and its result picklable. One rank without a group of others runs in a process of its own
    as well, because megatron-core keeps global state.

    Raises:
        RankFailure: a rank raised or died.
    """
    from torch.distributed import TCPStore

    CONTEXT.set_forkserver_preload(PRELOADED)
    # Hosted here, as torchrun's agent does: a port that is free now may be taken when a rank comes to bind it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world_size > 1 else None
    port = store.port if store is not None else 0
    ranks = []
    for rank in range(world_size):
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=_run_rank, args=(rank, world_size, port, theirs, function, args))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        return [_result(rank, connection, timeout_seconds) for rank, (_, connection) in enumerate(ranks)]
    finally:
        for process, ours in ranks:
            ours.close()
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        # Kept until no rank can ask it any more.
        del store


def _run_rank(
    rank: int, world_size: int, port: int, result: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_USE_AGENT_STORE="True",
        )
    try:
        answer = (True, function(*args))
    except BaseException:  # noqa: BLE001  # whatever it is, the parent must hear of it
        answer = (False, traceback.format_exc())
    result.send(answer)
    if answer[0]:
        # A rank that leaves breaks the connections of those that are still forming their groups: all leave together,
        # when the test closes its end.
        result.poll(TIMEOUT_SECONDS)
    # Leave without torn-down groups waiting for ranks that have gone.
    os._exit(0)


def _result(rank: int, connection: Connection, timeout_seconds: float) -> Any:
    if not connection.poll(timeout_seconds):
        raise RankFailure(f"rank {rank} gave no answer within {timeout_seconds:g} s")
    try:
        succeeded, answer = connection.recv()
    except EOFError as error:
        raise RankFailure(f"rank {rank} died") from error
    if not succeeded:
        raise RankFailure(f"rank {rank}:\n{answer}")
    return answer
