"""The commands of tools/convert_checkpoint.py: which flags each has, and what it prints."""

import json
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from megatron_moe.checkpoint.hf.options import (
    ExportOptions,
    ForeignOptions,
    ImportOptions,
    InspectOptions,
    VerifyOptions,
)
from megatron_moe.config.base import ConfigError
from megatron_moe.config.flags import parse_sections
from megatron_moe.config.schema import nearest

PROGRAM = "python tools/convert_checkpoint.py"


def main(argv: Sequence[str], doc: str) -> None:
    """Run a command.

    Args:
        argv: the command and its flags.
        doc: what --help shows without a command.

    Raises:
        SystemExit: help was asked for.
        UserError: a flag, a file or the proof is wrong.
    """
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(doc.strip())
        # As argparse leaves after --help.
        raise SystemExit(0)
    command, *rest = words
    if command not in COMMANDS:
        near = nearest(command, COMMANDS)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(COMMANDS)}"
        raise ConfigError(f"{command}: unknown command; {hint}")
    COMMANDS[command](rest)


def _parse[Options](command: str, options: type[Options], words: Sequence[str], example: str) -> tuple[Options, bool]:
    prog = f"{PROGRAM} {command}"
    description = (options.__doc__ or "").splitlines()[0]
    flags, debug = parse_sections(words, {command: options}, prog=prog, description=description, example=example)
    return flags[command], debug


def _to_hf(words: Sequence[str]) -> None:
    example = f"{PROGRAM} to-hf --load runs/tiny --output exported"
    options, debug = _parse("to-hf", ExportOptions, words, example)
    # torch is imported below: --help and wrong flags answer at once.
    from megatron_moe.checkpoint.hf.export import export_hf

    _print(export_hf(options, f"{PROGRAM} to-hf {shlex.join(words)}", debug=debug))


def _from_hf(words: Sequence[str]) -> None:
    options, debug = _parse("from-hf", ImportOptions, words, f"{PROGRAM} from-hf --hf model-folder --save runs/new")
    from megatron_moe.checkpoint.hf.importing import import_hf

    _print(import_hf(options, debug=debug))


def _verify(words: Sequence[str]) -> None:
    options, debug = _parse("verify", VerifyOptions, words, f"{PROGRAM} verify --load runs/tiny --hf exported")
    from megatron_moe.checkpoint.hf.compare import verify_hf

    _print(verify_hf(options, debug=debug))


def _inspect(words: Sequence[str]) -> None:
    if words and not words[0].startswith("-"):
        words = ["--path", *words]
    options, _ = _parse("inspect", InspectOptions, words, f"{PROGRAM} inspect runs/tiny")
    from megatron_moe.checkpoint.hf.inspect import inspect_checkpoint

    found = inspect_checkpoint(Path(options.path))
    _print([json.dumps(found.to_json(), indent=1)] if options.json else found.lines())


def _foreign(command: str) -> Callable[[Sequence[str]], None]:
    def run(words: Sequence[str]) -> None:
        options, _ = _parse(command, ForeignOptions, words, f"{PROGRAM} {command} --source folder --save runs/new")
        from megatron_moe.checkpoint.hf.importing import import_foreign

        _print(import_foreign(options, command))

    return run


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "to-hf": _to_hf,
    "from-hf": _from_hf,
    "verify": _verify,
    "inspect": _inspect,
    "from-pai": _foreign("from-pai"),
    "from-deepspeed": _foreign("from-deepspeed"),
    "from-megatron": _foreign("from-megatron"),
}
