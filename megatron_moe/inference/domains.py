"""Which domain a text belongs to, for models that were trained with domains. No torch here.

The field `domain` of a JSON Lines row, else --domain, names it or gives its number; token files have it beside them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.config.model import ModelConfig
from megatron_moe.data.documents import parse_object
from megatron_moe.data.domains import read_domains
from megatron_moe.data.files import iterate_lines, open_stream
from megatron_moe.data.indexed import IndexedFile

_FLAG = "--domain"


def domain_number(value: Any, model: ModelConfig, where: str) -> int:
    """A domain's number, from its name or number.

    Args:
        value: as it was given.
        model: knows how many there are, and their names.
        where: begins errors.

    Raises:
        UserError: the model knows no such domain.
    """
    count, names = model.num_domains or 0, model.domain_names or ()
    if not isinstance(value, bool):
        if isinstance(value, str) and value in names:
            return names.index(value)
        number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
        if isinstance(number, int) and 0 <= number < count:
            return number
    if not count:
        raise UserError(f"{where}: domain {value!r}, but the model was trained without domains; leave it out")
    known = f", or one of {', '.join(names)}" if names else ""
    raise UserError(f"{where}: domain {value!r}; must be a number from 0 to {count - 1}{known}")


def text_domains(count: int, model: ModelConfig, flag: str | None, rows: str | Path | None = None) -> list[int] | None:
    """The domain of every text; None for a model without domains.

    Args:
        count: texts.
        model: of the run.
        flag: --domain, for texts that do not say.
        rows: JSON Lines file of these texts, in order.

    Raises:
        UserError: a domain is unknown, or not given at all; names the line.
    """
    default = None if flag is None else domain_number(flag, model, _FLAG)
    if model.num_domains is None:
        return None
    given = [None] * count if rows is None else _row_domains(Path(rows), model)
    if model.num_domains == 1 and default is None:
        default = 0
    numbers = []
    for place, number in enumerate(given, start=1):
        chosen = default if number is None else number
        if chosen is None:
            where = f"{rows} line {place}: no field 'domain', and" if rows is not None else "--domain:"
            names = f" ({', '.join(model.domain_names)})" if model.domain_names else ""
            raise UserError(
                f"{where} the model tells {model.num_domains} domains apart{names}; give "
                + ("the field, or --domain" if rows is not None else "one")
            )
        numbers.append(chosen)
    return numbers


def file_domains(source: IndexedFile, model: ModelConfig) -> "TokenDomains | None":
    """Domains of a token file's tokens; None for a model without domains.

    Raises:
        UserError: the file has none, or others than the model.
    """
    if model.num_domains is None:
        return None
    domains = read_domains(source.prefix, len(source.lengths))
    domains.check_number(model.num_domains)
    if model.domain_names is not None and domains.names != model.domain_names:
        raise UserError(
            f"--data-path {source.prefix}: its domains are {', '.join(domains.names)}, the model's "
            f"{', '.join(model.domain_names)}; make it with --domains {' '.join(model.domain_names)}"
        )
    return TokenDomains(domains.ids, source.lengths)


class TokenDomains:
    """The domain of every token of a file.

    Args:
        ids: of every document.
        lengths: tokens of every document.
    """

    def __init__(self, ids: npt.NDArray[np.uint16], lengths: npt.NDArray[np.int32]) -> None:
        self._ids = ids
        self._ends = np.cumsum(lengths, dtype=np.int64)

    def stretch(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """[length] of the tokens from `start` on."""
        documents = np.searchsorted(self._ends, np.arange(start, start + length), side="right")
        return self._ids[documents].astype(np.int64)


def _row_domains(path: Path, model: ModelConfig) -> Sequence[int | None]:
    found: list[int | None] = []
    with open_stream(path) as (stream, _):
        for number, line in enumerate(iterate_lines(stream, path), start=1):
            entry = parse_object(line, "the field 'text'", path, number)
            where = f"{path} line {number}"
            found.append(domain_number(entry["domain"], model, where) if "domain" in entry else None)
    return found
