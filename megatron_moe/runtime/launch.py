"""How an entry point ends: a mistake is one line, a bug one traceback, and neither is drowned by the other ranks.

A rank that fails says why and leaves at once; torchrun then stops the others. Those may notice the failure first, as a
collective that lost its connection: that is no reason of its own, so they keep quiet and leave too. Ranks agree on who
speaks through the store of torchrun's agent, which can be reached before and after process groups. `--debug` shows
every rank's traceback.
"""

import functools
import os
import re
import signal
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megatron_moe.config.base import UserError
from megatron_moe.runtime import signals

USER_ERROR_CODE = 2
BUG_CODE = 1
STORE_TIMEOUT_SECONDS = 5
# torchrun's agent looks at its ranks ten times a second; whoever is left after this long has no agent.
GRACE_SECONDS = 5.0
# What gloo (gloo/transport/tcp/pair.cc), torch's store (TCPStore.cpp, socket.cpp) and NCCL say when a peer has gone.
LOST_CONNECTION = re.compile(
    r"Connection closed by peer|Connection reset by peer|Connection refused|Broken pipe"
    r"|Failed to recv, got 0 bytes|remote process exited or there was a network error"
    r"|unable to read data from the store",
    re.IGNORECASE,
)
LOST = "lost its connection"
"""What a rank puts down that knows no more than that; a reason goes over it."""


class AnotherRankFailed(RuntimeError):
    """This rank stops because of another, which says why itself."""


class Reason(NamedTuple):
    """Why a rank failed, as the others can read it."""

    who: str
    code: int
    text: str


def run_entry_point(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call `main(argv)` and leave the process with the right code.

    A `UserError` is printed as `error: ...` and gives code 2, any other error is printed with its traceback and gives
    code 1; both by the first rank that meets one. With --debug every rank shows its traceback.
    """
    from megatron_moe.runtime.quiet import silence_third_party_warnings

    silence_third_party_warnings()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        main(words)
        from megatron_moe.runtime.distributed import stop

        stop()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _leave(130)
    except BaseException as error:  # noqa: BLE001  # torch's CheckpointException is no Exception
        _leave(_explain(error, debug="--debug" in words))


def another_rank_failed() -> bool:
    """Whether a rank of this run has reported why it failed. Does not wait; any thread may ask."""
    return _reported() is not None


def lost_connection(error: BaseException) -> bool:
    """Whether an error only says that another rank has gone: a collective's own, or one raised because of it."""
    if isinstance(error, AnotherRankFailed):
        return True
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        # torch.distributed.checkpoint.api.CheckpointException: what went wrong on which rank.
        return all(lost_connection(failure) for failure, _ in failures.values())
    # Named, not imported: torch.distributed.DistError is the base of what the store and NCCL raise.
    collective = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    collective = collective or (isinstance(error, RuntimeError) and "gloo/" in str(error))
    if collective and LOST_CONNECTION.search(str(error)):
        return True
    return error.__cause__ is not None and lost_connection(error.__cause__)


def _explain(error: BaseException, *, debug: bool) -> int:
    """Say why this rank fails, unless another rank has said so; returns the exit code."""
    mistake = isinstance(error, UserError)
    code = USER_ERROR_CODE if mistake else BUG_CODE
    if debug:
        traceback.print_exception(error)
        if not lost_connection(error):
            _report(code, _summary(error))
        return code
    if lost_connection(error) and os.environ.get("WORLD_SIZE", "1") != "1":
        return _follow(error)
    # The agent ends this rank as soon as another has left: not before it has spoken.
    _on_termination(signal.SIG_IGN)
    before = _report(code, _summary(error))
    if before is None:
        if mistake:
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
    elif not mistake and before.text != _summary(error):
        # Perhaps a consequence of the first failure, perhaps not: never hidden.
        print(f"rank {_rank()} also failed: {_summary(error)}; --debug shows where", file=sys.stderr, flush=True)
    return code


def _follow(error: BaseException) -> int:
    """Leave after a rank that has gone. Its reason is the one to print: by itself, or by torchrun if it was killed."""
    before = _report(BUG_CODE, LOST)
    if signals.unanswered():
        # The launcher has told this rank to end, so it knows of the other one.
        return 128 + signal.SIGTERM
    _on_termination(signal.SIG_DFL)
    time.sleep(GRACE_SECONDS)
    before = _reported() or before
    if before is not None and before.who != _me():
        return before.code
    print(
        f"error: rank {_rank()} lost its connection to another rank, which gave no reason: killed, or out of memory? "
        f"({_root(error)}); look for that rank's end, then go on with --load; --debug shows more",
        file=sys.stderr,
        flush=True,
    )
    return BUG_CODE


def _report(code: int, text: str) -> Reason | None:
    """Put down why this rank fails; None if it is the first to do so, else what the first one put down."""
    store = _store()
    if store is None:
        # Nobody to ask: the first rank of each node speaks, the others only if they are not ended meanwhile.
        if os.environ.get("LOCAL_RANK", "0") != "0":
            _on_termination(signal.SIG_DFL)
            time.sleep(GRACE_SECONDS)
        return None
    mine = f"{_me()}\n{code}\n{text}"
    try:
        written = store.compare_set(_key(), "", mine).decode()
        if _parse(written).text == LOST and text != LOST:
            written = store.compare_set(_key(), written, mine).decode()
    except RuntimeError:
        return None
    return None if written == mine else _parse(written)


def _reported() -> Reason | None:
    """What the first rank that failed put down."""
    store = _store()
    try:
        if store is None or not store.check([_key()]):
            return None
        return _parse(store.get(_key()).decode())
    except RuntimeError:
        # The agent has gone: nothing can be asked any more.
        return None


def _parse(written: str) -> Reason:
    who, code, text = written.split("\n", 2)
    return Reason(who, int(code), text)


def _key() -> str:
    return f"megatron_moe/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


_stores: list[Any] = []
_stores_lock = threading.Lock()


def _store() -> Any:
    """A connection to the store of torchrun's agent, made at the first call; None where there is none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    with _stores_lock:
        if not _stores:
            from datetime import timedelta

            from torch.distributed import DistError, TCPStore

            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            try:
                timeout = timedelta(seconds=STORE_TIMEOUT_SECONDS)
                _stores.append(TCPStore(host, port, is_master=False, timeout=timeout))
            except DistError:
                _stores.append(None)
        return _stores[0]


def _summary(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0]


def _root(error: BaseException) -> str:
    """First line of what stands at the end of a chain of causes."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _summary(error)[:200]


@functools.cache
def _me() -> str:
    """This process among all that report; not by its rank, which a start script may give wrongly."""
    return uuid.uuid4().hex


def _rank() -> str:
    return os.environ.get("RANK", "0")


def _on_termination(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _leave(code: int) -> None:
    """Exit without running destructors: one that waits for other ranks would hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
