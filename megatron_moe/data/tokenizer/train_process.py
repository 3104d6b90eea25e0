"""The process that trains: SentencePiece on a file of sentences, ended when its parent ends.

Started by `train`, which reads its log: SentencePiece holds Python's lock while it trains and writes what it skipped
only to standard error.
"""

import ctypes
import json
import resource
import signal
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Train as the first argument says (JSON), and print the outcome as JSON."""
    if sys.platform == "linux":
        # Without it a killed tool would leave this process at work for hours.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.loads(sys.argv[1])
    import sentencepiece

    outcome: dict[str, object] = {}
    try:
        with open(request["model"], "wb") as model:
            sentencepiece.SentencePieceTrainer.train(input=request["input"], model_writer=model, **request["options"])
    except (RuntimeError, OSError) as error:
        outcome["error"] = str(error)
    outcome["peak_bytes"] = peak_memory()
    print(json.dumps(outcome))


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its maximum begins with that of the process which started this one.
        line = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    # In bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
