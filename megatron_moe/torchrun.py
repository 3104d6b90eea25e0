"""torchrun without its traceback, and which lets a stopped run save.

    python -m megatron_moe.torchrun --nproc-per-node 4 -m megatron_moe.pretrain --recipe tiny-cpu ...

torchrun itself works as well; when a rank fails it adds some forty lines about itself below the reason, and after
SIGTERM or Ctrl-C it kills the ranks 30 seconds later (its `--shutdown-timeout`), saved or not. Here they are told, and
waited for.
"""

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import psutil

from megatron_moe.runtime import replace
from megatron_moe.runtime.launch import USER_ERROR_CODE
from megatron_moe.runtime.replace import Replacement
from megatron_moe.runtime.signals import STOPPED_CODE

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
            # It may have ended meanwhile.
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell_ranks)
    replace.apply([stopped_is_final()])
    try:
        torchrun(["--signals-to-handle", _LEFT_TO_TORCHRUN, *words])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if not told and failure.exitcode not in (USER_ERROR_CODE, STOPPED_CODE):
            print(f"error: rank {rank} ended with {_describe(failure.exitcode)}; its output is above", file=sys.stderr)
        # A signal shows as a negative code; shells count it from 128.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except KeyboardInterrupt:
        return 128 + (told[0] if told else signal.SIGINT)
    return 0


def stopped_is_final() -> Replacement:
    """Ranks that a signal has stopped must not be started again, as torchrun does with --max-restarts.

    Any code but 0 is a failure to it. `_remaining_restarts` is what torch/distributed/elastic/agent/server/api.py:
    SimpleElasticAgent._invoke_run asks after each look.
    """
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    look = LocalElasticAgent._monitor_workers

    def monitor_workers(agent: Any, group: Any) -> Any:
        result = look(agent, group)
        if any(failure.exitcode == STOPPED_CODE for failure in result.failures.values()):
            agent._remaining_restarts = 0
        return result

    module = "torch.distributed.elastic.agent.server.local_elastic_agent:LocalElasticAgent"
    return Replacement(module, "_monitor_workers", monitor_workers, "with --max-restarts it restarts a stopped run")


def _describe(exitcode: int) -> str:
    return f"exit code {exitcode}" if exitcode > 0 else f"signal {-exitcode}"


if __name__ == "__main__":
    sys.exit(main())
