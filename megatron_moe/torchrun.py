"""torchrun without its traceback, and which lets a stopped run save.

    python -m megatron_moe.torchrun --nproc-per-node 4 -m megatron_moe.pretrain --recipe tiny-cpu ...

torchrun itself works as well; when a rank fails it adds some forty lines about itself below the reason, and after
SIGTERM or Ctrl-C it kills the ranks 30 seconds later (its `--shutdown-timeout`), saved or not. Here they are told, and
waited for.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil

from megatron_moe.runtime.launch import USER_ERROR_CODE

# What torchrun goes on to answer itself, by killing the ranks; it takes SIGTERM and SIGINT as well by default.
_LEFT_TO_TORCHRUN = "SIGHUP,SIGQUIT"
_SECONDS_TO_DIE = "10"


def main(argv: Sequence[str] | None = None) -> int:
    """Launch the ranks; returns the exit code of the first that failed, or 0."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    words = list(sys.argv[1:] if argv is None else argv)
    if "--debug" not in words:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # On CPU ranks that share a few cores more threads than this stand in each other's way; torchrun's own default, but
    # without its warning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Stopped ranks are waited for without a limit, below; this one is for those that another's failure leaves behind.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _SECONDS_TO_DIE)
    told: list[int] = []

    def tell_ranks(number: int, frame: FrameType | None) -> None:
        """Hand the signal on: ranks save and leave, and torchrun ends as they do. A second Ctrl-C ends it at once."""
        ranks = psutil.Process().children()
        if not ranks or (told and number == signal.SIGINT):
            raise KeyboardInterrupt
        told.append(number)
        for rank in ranks:
            rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell_ranks)
    try:
        torchrun(["--signals-to-handle", _LEFT_TO_TORCHRUN, *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if not told and failure.exitcode != USER_ERROR_CODE:
            print(f"error: rank {rank} ended with {_describe(failure.exitcode)}; its output is above", file=sys.stderr)
        # A signal shows as a negative code; shells count it from 128.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except KeyboardInterrupt:
        return 128 + (told[0] if told else signal.SIGINT)
    return 0


def _describe(exitcode: int) -> str:
    return f"exit code {exitcode}" if exitcode > 0 else f"signal {-exitcode}"


if __name__ == "__main__":
    sys.exit(main())
