"""A conversion under way: the folder with a temporary name, and the journal in it of what is finished.

A conversion that was killed goes on where it was if it is started again with the same source and options, and anew if
either changed. The journal says what has been written, not what has reached the disk, so it counts as long as the
machine runs.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_moe.checkpoint.layout import UNFINISHED
from megatron_moe.config.base import UserError, disk_error

_JOURNAL = "conversion.journal"
# Tokenizer, card, configs, index, journal.
_SMALL_FILES = 64 << 20
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def unfinished_folder(output: Path) -> Path:
    """Where a conversion into `output` writes until it is complete."""
    return output.with_name(output.name + UNFINISHED)


def check_free(output: Path, flag: str) -> None:
    """Refuse a place that holds something.

    Raises:
        UserError: it does, or is no folder.
    """
    # A folder cannot take the name of a link, be the place that it leads to ever so empty.
    if output.is_dir() and not output.is_symlink() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise UserError(f"{flag} {output}: is there already; give a new folder, or remove it")


def check_room(output: Path, needed: int, flag: str) -> None:
    """There must be room for tensors of so many bytes, and for the small files beside them.

    Raises:
        UserError: there is not.
    """
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + _SMALL_FILES:
        raise UserError(
            f"{flag} {output}: needs {_gigabytes(needed + _SMALL_FILES)}, but {place} has {_gigabytes(free)} free; "
            "make room, or give another place"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"


def fingerprint(parts: Iterable[object], inputs: Sequence[Path]) -> str:
    """Changes with any of the parts and of the files, and when the machine starts anew."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    for path in inputs:
        for file in sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]:
            status = file.stat()
            digest.update(f"{file.absolute()} {status.st_size} {status.st_mtime_ns}\n".encode())
    digest.update(_BOOT.read_bytes() if _BOOT.exists() else os.urandom(16))
    return digest.hexdigest()


class Journal:
    """The unfinished folder of one conversion, which no other process writes to while this is open.

    Args:
        output: the folder that it will become.
        flag: that names `output` in errors.
        identity: of the conversion (`fingerprint`).

    Raises:
        UserError: another process converts into the same folder, or it cannot be written.
    """

    def __init__(self, output: Path, flag: str, identity: str) -> None:
        self.folder = unfinished_folder(output)
        self._output, self._flag, self._identity = output, flag, identity
        self._path = self.folder / _JOURNAL
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("a+", encoding="utf-8")
        except OSError as error:
            raise disk_error(f"{flag} {output}", error) from error
        try:
            self._lock()
        except OSError as error:
            self._stream.close()
            if not isinstance(error, (BlockingIOError, FileNotFoundError)):
                raise disk_error(f"{flag} {output}", error) from error
            raise UserError(f"{flag} {output}: another process is converting into it; wait for it to end") from error
        self.done = self._read()

    def _lock(self) -> None:
        fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Of a conversion that came to its end meanwhile, it is the lock of nothing.
        if not os.path.samestat(os.fstat(self._stream.fileno()), self._path.stat()):
            raise FileNotFoundError(self._path)

    def _read(self) -> set[int] | None:
        """What an earlier conversion finished; None where there was none, or another one."""
        self._stream.seek(0)
        lines = self._stream.read().splitlines(keepends=True)
        if not lines or lines[0] != self._identity + "\n":
            return None
        done: set[int] = set()
        for line in lines[1:]:
            # The last line may be cut short.
            if line.endswith("\n"):
                done.update(json.loads(line))
        return done

    def keep_only(self, files: Iterable[Path]) -> None:
        """Remove all but these files and the journal: what an earlier start, with other options, wrote beside them.

        Raises:
            UserError: that cannot be done.
        """
        kept = {self._path, *files}
        kept |= {folder for file in kept for folder in file.parents}
        self._remove(path for path in list(self.folder.rglob("*")) if path not in kept)

    def start_anew(self) -> None:
        """Remove what lies in the folder.

        Raises:
            UserError: that cannot be done.
        """
        self._remove(path for path in list(self.folder.iterdir()) if path != self._path)
        try:
            self._stream.truncate(0)
        except OSError as error:
            raise disk_error(f"{self._flag} {self._output}", error) from error
        self.done = None

    def _remove(self, paths: Iterable[Path]) -> None:
        try:
            for path in paths:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    # What lay in a folder has gone with it.
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(f"{self._flag} {self._output}", error) from error

    def begin(self) -> None:
        """The files are prepared: what follows is about them."""
        self._append(self._identity)
        self.done = set()

    def add(self, pieces: Sequence[int]) -> None:
        """These pieces are written."""
        self._append(json.dumps(list(pieces)))

    def _append(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except OSError as error:
            raise disk_error(f"{self._flag} {self._output}", error) from error

    def publish(self) -> None:
        """Everything is written: flush it to the disk and give the folder its name.

        Raises:
            UserError: the disk fails, or something has appeared in that place.
        """
        check_free(self._output, self._flag)
        try:
            for path in [*self.folder.rglob("*"), self.folder]:
                _flush(path)
            # The journal goes last: without it another process would take the folder for one to start anew in.
            self.folder.rename(self._output)
            (self._output / _JOURNAL).unlink()
            _flush(self._output)
            _flush(self._output.parent)
        except OSError as error:
            raise disk_error(f"{self._flag} {self._output}", error) from error

    def discard(self) -> None:
        """Nothing that was written can be used; `close` removes it."""
        self.done = None

    def close(self) -> None:
        """Let others write to the folder, of which nothing is left where nothing was begun, or all was discarded."""
        if self.done is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._stream.close()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
