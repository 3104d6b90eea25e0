"""What the data tools' command lines share: a strict argument parser, progress bars and one-line errors."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Never, NoReturn

from tqdm import tqdm

from megatron_moe.config.base import UserError


class ToolParser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes flags only in full and suggests the nearest one for a typing error.

    The tool's module docstring serves as its help, so that the commands in it stay where a reader looks
    first.
    """

    def __init__(self, doc: str | None) -> None:
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def parse_tool_args(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse `argv` (the process's own when None).

        Raises:
            SystemExit: code 2 after one line on an unknown flag or an illegal value.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        # Before argparse looks: it would rather complain about the required flag that the misspelled one
        # stands for.
        for word in words:
            if word.startswith("--") and word.split("=")[0] not in self._option_string_actions:
                self.error(self._explain_unknown(word))
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage block, and exit with code 2."""
        self.exit(2, f"error: {message} (see --help)\n")

    def _explain_unknown(self, word: str) -> str:
        name = word.split("=")[0]
        near = difflib.get_close_matches(name, list(self._option_string_actions), n=1)
        return f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else "")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The flag `--workers`, the same for every tool: the number of processes never changes what is written."""
    parser.add_argument(
        "--workers",
        type=_at_least_one,
        default=_cores(),
        metavar="N",
        help="processes; the output is the same for any number (default: the cores of this machine, %(default)s)",
    )


def _at_least_one(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be a whole number, at least 1")
    return int(word)


def _cores() -> int:
    # Not os.cpu_count(): a container or Slurm may have given this process fewer.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def byte_progress(total_bytes: int, description: str, shown: bool | None = None) -> "tqdm[Never]":
    """A progress bar over bytes with rate and time left, on standard error.

    Args:
        total_bytes: bytes of the input on disk, compressed where it is.
        description: what is being done, in one or two words.
        shown: whether to draw it; by default only on a terminal.
    """
    disable = None if shown is None else not shown
    return tqdm(total=total_bytes, desc=description, unit="B", unit_scale=True, disable=disable, dynamic_ncols=True)


def run_tool(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run a tool's `main` on the process's arguments and exit: 0, or 2 after one line on a `UserError`."""
    try:
        main(None)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
