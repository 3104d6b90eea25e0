"""SIGTERM and SIGINT while a run trains: noticed at once, answered at the end of the step.

Schedulers send SIGTERM before they kill, people press Ctrl-C; a run then saves and leaves with `STOPPED_CODE`, so that
a script can tell "run me again" from an error. Python runs signal handlers between bytecodes of the main thread, hence
not while that waits in a collective. So the number goes through a pipe, which the interpreter's C handler fills, to a
thread that is never blocked; the main thread asks `received` between steps.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

STOPPED_CODE = 75
"""Exit code of a run that a signal stopped and that is saved: EX_TEMPFAIL of sysexits.h, "try again later"."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_SECONDS = 0.5
_END = b"\0"
_unanswered: list[signal.Signals] = []


def unanswered() -> bool:
    """Whether a signal came that nothing answered, because an error ended the training."""
    return bool(_unanswered)


class StopSignals:
    """While it is entered, a first SIGTERM or SIGINT is only noted; a second SIGINT ends the process.

    Args:
        lost: asked twice a second once a signal has come: whether the run can no longer reach the end of its step,
            because another rank has failed. A launcher stops the ranks of a failed run with the same signal as a
            scheduler; they wait for a rank that is gone, and must not wait for long.
    """

    def __init__(self, lost: Callable[[], bool] = lambda: False) -> None:
        self.received: signal.Signals | None = None
        self._lost = lost
        self._before: list[tuple[int, Any]] = []

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = [(number, signal.signal(number, lambda *_: None)) for number in SIGNALS]
        self._thread = threading.Thread(target=self._watch, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.received is not None:
            _unanswered.append(self.received)
        for number, handler in self._before:
            # None: a C library had set it, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        # Not left to the closing of the pipe: forked loader workers hold its other end as well.
        os.write(self._writer, _END)
        self._thread.join()
        os.close(self._writer)

    def _watch(self) -> None:
        with os.fdopen(self._reader, "rb", buffering=0) as pipe:
            while (byte := pipe.read(1)) != _END:
                number = byte[0]
                if number not in SIGNALS:
                    continue
                if self.received is None:
                    self.received = signal.Signals(number)
                    threading.Thread(target=self._leave_when_lost, name="lost-run", daemon=True).start()
                elif number == signal.SIGINT:
                    os._exit(128 + signal.SIGINT)

    def _leave_when_lost(self) -> None:
        while self._thread.is_alive():
            if self._lost():
                os._exit(128 + signal.SIGTERM)
            self._thread.join(_LOOK_SECONDS)


def leave_signals_to_parent(worker: int = 0) -> None:
    """For processes that only serve another one (loader workers): a stop signal to all must not end them first.

    They end when their parent does. Fits torch's `worker_init_fn`, which gets the worker's number.
    """
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
