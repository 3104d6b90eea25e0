"""What every config section shares: the error type and the help text that stands under a field.

A section is a frozen dataclass whose fields are flags. The string literal under a field is its help:
`field_help` reads it from the source, so `--help`, the YAML comments and the docs have one origin.
"""

import ast
import errno
import inspect
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any


class UserError(Exception):
    """A mistake the user can mend: one line that names the flag or file, its value, and what would be right.

    Entry points print it without a traceback and exit with code 2 (see `megatron_moe.runtime.launch`).
    """


class Resumable(UserError):
    """Nothing that was given is wrong, and what is written so far is right: the same start goes on with it.

    What cannot be finished is removed (`checkpoint/convert/stream.py:convert`); after this error it is kept.
    """


class ConfigError(UserError):
    """An illegal flag or an illegal combination of flags."""


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_error(where: str, error: OSError) -> Resumable:
    """What to say of a file that cannot be written: `where` names the flag or the file."""
    cure = "make room, then start again" if error.errno in DISK_FULL else "give a place that can be written"
    return Resumable(f"{where}: cannot be written: {error.strerror or error}; {cure}")


def flag_name(field_name: str) -> str:
    """`num_layers` -> `--num-layers`."""
    return "--" + field_name.replace("_", "-")


def require(condition: bool, field_name: str, value: Any, legal: str) -> None:
    """Raise `ConfigError` naming the flag, its value and the legal range unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{flag_name(field_name)} {format_value(value)}: must be {legal}")


def require_positive(section: Any, *field_names: str) -> None:
    """Every named field of `section` that is set must be at least 1."""
    for name in field_names:
        value = getattr(section, name)
        require(value is None or value >= 1, name, value, "at least 1")


def require_fraction(section: Any, *field_names: str) -> None:
    """Every named field of `section` that is set must lie in [0, 1)."""
    for name in field_names:
        value = getattr(section, name)
        require(value is None or 0.0 <= value < 1.0, name, value, "in [0, 1)")


def format_value(value: Any) -> str:
    """A value as the user would type it after the flag."""
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return str(value)


@cache
def field_help(section: type) -> dict[str, str]:
    """Help per field of a config dataclass: the string literal that stands under it in the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    helps: dict[str, str] = {}
    for node, following in pairwise(body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            helps[node.target.id] = " ".join(str(following.value.value).split())
    return helps
