"""torchrun without its traceback: the same flags, but a rank's own error line is the last thing on the screen.

    python -m megatron_moe.torchrun --nproc-per-node 4 -m megatron_moe.pretrain --recipe tiny-cpu ...

torchrun itself works as well; when a rank fails it adds some forty lines about itself below the reason.
"""

import logging
import os
import sys
from collections.abc import Sequence

from megatron_moe.runtime.launch import USER_ERROR_CODE


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
    try:
        torchrun(words)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode != USER_ERROR_CODE:
            print(f"error: rank {rank} ended with {_describe(failure.exitcode)}; its output is above", file=sys.stderr)
        # A signal shows as a negative code; shells count it from 128.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except KeyboardInterrupt:
        return 130
    return 0


def _describe(exitcode: int) -> str:
    return f"exit code {exitcode}" if exitcode > 0 else f"signal {-exitcode}"


if __name__ == "__main__":
    sys.exit(main())
