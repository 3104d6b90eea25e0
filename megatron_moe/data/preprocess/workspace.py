"""The folder PREFIX.parts of an unfinished run: finished parts, which a run that was killed does not do again.

    job                     what the parts were made with
    lock                    held by the one run that works here
    NAME.0.bin .lengths ... of piece NAME (tasks.py), for every field: tokens, int32 tokens of each sequence, int32
    NAME.0.documents        sequences of each document (with --split-sentences only)
    NAME.0.domains          domain of each document, uint16 (with --domain-key only), counted in the piece's own names
    NAME.done               counts and checksums of the piece; written last, so it says the files above are whole

Nothing here waits for the disk: after a power failure a file may not hold what was written. The checksums, compared
when parts are put together, see that. The folder goes when the result stands.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError, disk_error
from megatron_moe.data.files import atomic_write, locked_file
from megatron_moe.data.preprocess.job import Totals, fingerprint

_JOB = "job"
_LOCK = "lock"


@dataclass(frozen=True)
class Done:
    """A finished piece.

    Attributes:
        totals: counts, a field each.
        lines: lines or rows of the input in it.
        ended: the file's end was seen in it.
        domains: names of the domains that occur, in the order in which they do.
        position: bytes of the file on the disk read so far, for a compressed file; else 0.
        checksums: crc32 of each column, by field.
    """

    totals: tuple[Totals, ...]
    lines: int
    checksums: tuple[tuple[int, ...], ...]
    ended: bool = False
    position: int = 0
    domains: tuple[str, ...] = ()


@dataclass(frozen=True)
class Workspace:
    """Where parts lie.

    Attributes:
        folder: the folder itself.
        where: how errors of writing name it: the file that is to come out of it.
    """

    folder: Path
    where: str

    def column(self, name: str, field: int, column: str) -> Path:
        """The file of a piece, a field and a column."""
        return self.folder / f"{name}.{field}.{column}"

    def write_done(self, name: str, done: Done) -> None:
        """Say that a piece's files are whole."""
        path = self.folder / f"{name}.done"
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(asdict(done)), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise disk_error(self.where, error) from error

    def read_done(self, name: str) -> Done | None:
        """What is known of a piece, None where it was not finished or that cannot be read, so that it is done again."""
        try:
            saved = json.loads((self.folder / f"{name}.done").read_bytes())
            totals = tuple(Totals(**counts) for counts in saved.pop("totals"))
            checksums = tuple(map(tuple, saved.pop("checksums")))
            domains = tuple(saved.pop("domains", ()))
            return Done(totals=totals, checksums=checksums, domains=domains, **saved)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


@contextlib.contextmanager
def open_workspace(prefix: Path, options: dict[str, Any], where: str) -> Iterator[Workspace]:
    """Take the folder PREFIX.parts for this process alone.

    Left by an exception it stays if it holds a finished part; left in order it is removed.

    Raises:
        UserError: another run works there, an unfinished run of other options left it, or it cannot be written.
    """
    folder = Path(f"{prefix}.parts")
    busy = f"{folder}: another run is writing {prefix}; wait for it, or stop it"
    with locked_file(folder / _LOCK, busy, where):
        try:
            _check_job(folder, options, where)
            _remove_unfinished(folder)
            yield Workspace(folder, where)
        except BaseException:
            if not any(folder.glob("*.done")):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder)


def _check_job(folder: Path, options: dict[str, Any], where: str) -> None:
    path = folder / _JOB
    if not any(folder.glob("*.done")):
        atomic_write(path, json.dumps({"fingerprint": fingerprint(options), **options}, indent=1) + "\n", where)
        return
    try:
        earlier = json.loads(path.read_bytes())
        changed = [name for name in options if earlier.get(name) != options[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); delete {folder} and start again") from error
    if changed:
        name = changed[0]
        raise UserError(
            f"{folder}: holds the unfinished work of another command ({name}: {str(earlier.get(name))[:80]} there, "
            f"{str(options[name])[:80]} now); finish that one, or delete the folder"
        )


def _remove_unfinished(folder: Path) -> None:
    """What a killed run was writing."""
    for entry in os.scandir(folder):
        if entry.name.endswith(".tmp"):
            Path(entry.path).unlink()
