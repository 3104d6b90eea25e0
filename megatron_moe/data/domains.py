"""A domain for every document of a token file: `PREFIX.domains.npy` and `PREFIX.domains.json` beside the pair.

    .domains.npy    uint16 [documents], the domain of each document
    .domains.json   {"names": [...], "documents": [...]}: the names in the order of their numbers, and how many
                    documents each has

Routers and embeddings know a domain by its number alone, so files that are read together must have the same names in
the same order. No torch here.
"""

import contextlib
import errno
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError, disk_error
from megatron_moe.config.model import MOST_DOMAINS
from megatron_moe.data.files import atomic_file, atomic_write
from megatron_moe.data.safe_numpy import check_array_file

DTYPE = np.dtype("<u2")
_BLOCK = 1 << 22
_CURE = "write it with tools/preprocess_data.py --domain-key FIELD"


def ids_path(prefix: str | Path) -> Path:
    """The domains of a pair's documents."""
    return Path(f"{prefix}.domains.npy")


def names_path(prefix: str | Path) -> Path:
    """The names of these domains."""
    return Path(f"{prefix}.domains.json")


@dataclass(frozen=True)
class Domains:
    """Checked domains of a pair, memory-mapped.

    Attributes:
        prefix: of the pair.
        names: in the order of their numbers.
        documents: how many documents each has.
        ids: [documents] of every document.
    """

    prefix: str
    names: tuple[str, ...]
    documents: tuple[int, ...]
    ids: npt.NDArray[np.uint16]

    def check_number(self, num_domains: int) -> None:
        """Every domain that occurs must be one of the model's.

        Raises:
            UserError: one is not; names it and the file.
        """
        for number, (name, count) in enumerate(zip(self.names, self.documents, strict=True)):
            if count and number >= num_domains:
                raise UserError(
                    f"{ids_path(self.prefix)}: {count} documents are of domain {number} ({name}), but --num-domains is "
                    f"{num_domains}; it must be at least {len(self.names)}"
                )


def has_domains(prefix: str | Path) -> bool:
    """Whether domains stand beside a pair, whole or not."""
    return ids_path(prefix).exists() or names_path(prefix).exists()


def read_domains(prefix: str | Path, documents: int, flag: str = "--data-path") -> Domains:
    """The domains of a pair of so many documents.

    Args:
        prefix: of the pair.
        documents: how many the pair holds.
        flag: where the prefix came from, for errors.

    Raises:
        UserError: a file is missing or damaged, or belongs to another pair.
    """
    path, names_file = ids_path(prefix), names_path(prefix)
    for file in (path, names_file):
        if not file.is_file():
            raise UserError(f"{flag} {prefix}: no file {file}, which says the domain of each document; {_CURE}")
    try:
        names, counts = _read_names(names_file)
        check_array_file(path)
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
        if ids.dtype != DTYPE or ids.ndim != 1:
            raise ValueError(f"{path.name} holds {ids.dtype} {list(ids.shape)}, not a list of uint16")
        if len(ids) != documents:
            raise ValueError(f"{path.name} has {len(ids)} documents, the pair {documents}")
        found = np.zeros(1 << 16, np.int64)
        for start in range(0, len(ids), _BLOCK):
            found += np.bincount(ids[start : start + _BLOCK], minlength=1 << 16)
        if found[: len(names)].tolist() != list(counts) or found[len(names) :].any():
            raise ValueError(f"{path.name} does not hold what {names_file.name} says")
    except OSError as error:
        cure = "; raise it with ulimit -n, or merge files" if error.errno == errno.EMFILE else ""
        raise UserError(f"{flag} {prefix}: {path} cannot be read: {error.strerror}{cure}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{flag} {prefix}: {path} is damaged or of another pair ({error}); {_CURE}") from error
    return Domains(str(prefix), names, counts, ids)


def check_same_names(several: Sequence[Domains], flag: str) -> None:
    """Files that are used together must number their domains alike.

    Raises:
        UserError: two do not.
    """
    for domains in several[1:]:
        if domains.names != several[0].names:
            raise UserError(
                f"{flag} {domains.prefix}: its domains are {', '.join(domains.names)}, those of {several[0].prefix} "
                f"{', '.join(several[0].names)}; make both with the same --domains NAME NAME ..."
            )


def remove_domains(prefix: str | Path) -> None:
    """Delete what an earlier pair of that name has left."""
    for path in (names_path(prefix), ids_path(prefix)):
        path.unlink(missing_ok=True)


class DomainsWriter:
    """Collects the domains of a pair that is being written, in a nameless file; use it as a context manager.

    `discard_old` comes before the pair gets its name and `publish` after that: a pair without domains may be seen for
    a moment, one with another's never.

    Args:
        prefix: of the pair.
        scratch: folder for the nameless file.
    """

    def __init__(self, prefix: str | Path, scratch: Path) -> None:
        self._prefix = prefix
        self._counts = np.zeros(MOST_DOMAINS, np.int64)
        try:
            self._ids: IO[bytes] = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115
        except OSError as error:
            raise disk_error(str(ids_path(prefix)), error) from error

    def add(self, ids: npt.NDArray[np.integer]) -> None:
        """Append the domains of documents."""
        with self._disk_errors():
            self._ids.write(ids.astype(DTYPE).tobytes())
        self._counts += np.bincount(ids, minlength=MOST_DOMAINS)

    def discard_old(self) -> None:
        """Delete the domains of an earlier pair of that name."""
        with self._disk_errors():
            remove_domains(self._prefix)

    def publish(self, names: Sequence[str]) -> None:
        """Give the files their names."""
        with self._disk_errors(), atomic_file(ids_path(self._prefix)) as stream:
            header = {"descr": DTYPE.str, "fortran_order": False, "shape": (int(self._counts.sum()),)}
            np.lib.format.write_array_header_1_0(stream, header)
            self._ids.seek(0)
            while block := self._ids.read(_BLOCK):
                stream.write(block)
        content = {"names": list(names), "documents": self._counts[: len(names)].tolist()}
        atomic_write(names_path(self._prefix), json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(str(ids_path(self._prefix)), error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ids.close()


def _read_names(path: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    content = json.loads(path.read_bytes())
    names, counts = tuple(content["names"]), tuple(content["documents"])
    if not all(isinstance(name, str) and name.isprintable() for name in names) or not all(
        type(count) is int for count in counts
    ):
        raise ValueError(f"{path.name} does not hold names and counts")
    if len(names) != len(counts) or not 1 <= len(names) <= MOST_DOMAINS:
        raise ValueError(f"{path.name} holds {len(names)} names and {len(counts)} counts")
    return names, counts
