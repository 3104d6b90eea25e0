"""What the data tools' command lines share: a strict argument parser and one-line errors."""

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

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
