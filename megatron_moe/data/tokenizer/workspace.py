"""The folder a tokenizer is built in: what a finished or killed build left there, and how files get their names."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_moe.config.base import UserError, disk_error
from megatron_moe.data.tokenizer.options import BuildOptions

MODEL_FILE = "tokenizer.model"
REPORT_FILE, PAGE_FILE, TIMINGS_FILE = "report.json", "report.html", "timings.json"
_WORK = ".work"
# Raised when the same text and options would give other files.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Identity:
    """Hashes of all that decides the sample, and of all that decides the whole build."""

    sample: str
    build: str


def identify(
    files: Sequence[Path], heldout: Sequence[Path], compare: Sequence[Path], options: BuildOptions
) -> Identity:
    """The identity of a build; files count by their name, size and time of change."""

    def stamps(paths: Sequence[Path]) -> list[Any]:
        return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    sample = [VERSION, stamps(files), dataclasses.asdict(options.sample)]
    build = [sample, stamps(heldout), [str(path.resolve()) for path in compare], dataclasses.asdict(options)]
    return Identity(_hash(sample), _hash(build))


class Workspace:
    """An output folder and the hidden folder in it where the build works.

    Args:
        output: the folder.
        identity: of the build that is to be done there.

    Raises:
        UserError: the folder holds something else, or cannot be made.
    """

    def __init__(self, output: Path, identity: Identity) -> None:
        self.output = output
        self.work = output / _WORK
        self.flag = f"--output {output}"
        self._identity = identity
        self.finished = self._finished()
        if self.finished is not None:
            return
        if (output / MODEL_FILE).exists() and not self.work.is_dir():
            raise UserError(f"{self.flag}: holds a {MODEL_FILE} without a report; give another folder")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.flag, error) from error

    def _finished(self) -> dict[str, Any] | None:
        """The report of the same build, done earlier."""
        if not (self.output / REPORT_FILE).is_file():
            return None
        try:
            report: dict[str, Any] = json.loads((self.output / REPORT_FILE).read_bytes())
            same = json.loads((self.output / TIMINGS_FILE).read_bytes())["identity"] == self._identity.build
        except (OSError, ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(
                f"{self.flag}: holds a tokenizer of other text or options; remove it or give another folder"
            )
        # A kill behind the last name may have left it.
        shutil.rmtree(self.work, ignore_errors=True)
        return report

    def give_names(self, names: Sequence[str]) -> None:
        """Move finished files out of the working folder, the one that says all is done last, and remove it."""
        try:
            for name in names:
                (self.work / name).replace(self.output / name)
            shutil.rmtree(self.work)
        except OSError as error:
            raise disk_error(self.flag, error) from error


def _hash(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode("utf-8")).hexdigest()
