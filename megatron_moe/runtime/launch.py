"""How an entry point runs: mistakes become one line and exit code 2, on every rank, without a traceback."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from megatron_moe.config.base import UserError

USER_ERROR_CODE = 2


def run_entry_point(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call `main(argv)` and leave the process with the right code.

    A `UserError` is printed once per node, as `error: ...`; with --debug its traceback as well. Ranks leave at once,
    without waiting for the others: torchrun then stops those that did not fail.
    """
    from megatron_moe.runtime.quiet import silence_third_party_warnings

    silence_third_party_warnings()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        main(words)
    except UserError as error:
        if "--debug" in words:
            traceback.print_exc()
        elif os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        _leave(USER_ERROR_CODE)
    except KeyboardInterrupt:
        _leave(130)
    from megatron_moe.runtime.distributed import stop

    stop()


def _leave(code: int) -> None:
    """Exit without running destructors: one that waits for other ranks would hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
