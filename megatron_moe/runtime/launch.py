"""How an entry point runs: mistakes become one line and exit code 2, on every rank, without a traceback."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from megatron_moe.config.base import UserError

USER_ERROR_CODE = 2
STORE_TIMEOUT_SECONDS = 5


def run_entry_point(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call `main(argv)` and leave the process with the right code.

    A `UserError` is printed as `error: ...`, by the first rank that meets one; with --debug every rank shows its
    traceback. Ranks leave at once, without waiting for the others: torchrun then stops those that did not fail.
    """
    from megatron_moe.runtime.quiet import silence_third_party_warnings

    silence_third_party_warnings()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        main(words)
    except UserError as error:
        if "--debug" in words:
            traceback.print_exc()
        elif _first_to_report():
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(USER_ERROR_CODE)
    except KeyboardInterrupt:
        _leave(130)
    from megatron_moe.runtime.distributed import stop

    stop()


def _first_to_report() -> bool:
    """Whether no other rank has reported a mistake yet.

    torchrun ends all ranks as soon as one has left, so it must not be left to a certain rank. Its agent keeps a store
    that ranks can reach before they have formed a group; without one, the first rank of each node speaks.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ.get("LOCAL_RANK", "0") == "0"
    from datetime import timedelta

    from torch.distributed import DistError, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_TIMEOUT_SECONDS))
        return store.add(f"megatron_moe/error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except DistError:
        return True


def _leave(code: int) -> None:
    """Exit without running destructors: one that waits for other ranks would hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
