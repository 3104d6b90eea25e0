"""How a job is cut into tasks: by its inputs alone, so that any number of workers on any machines writes the same.

A file is one task. A large one that can be entered in the middle is several: bytes of a plain file, row groups of
Parquet.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.config.base import UserError
from megatron_moe.data.files import base_suffix, expand_inputs
from megatron_moe.data.wudao.rows import row_group_sizes
from megatron_moe.data.wudao.source import Source, inspect_source

# What the tool writes beside the shards: no shard may take these names.
REPORT, PAGE, TIMINGS, QUARANTINE = "report.json", "report.html", "timings.json", "quarantine.jsonl"
_TEXT = ".txt"


@dataclass(frozen=True)
class InputFile:
    """A file of `--input`.

    Attributes:
        path: where it is.
        shown: how the user named it, for messages.
        name: unique among the inputs and made from the file's name; shards are named after it.
        size, modified: to notice that it changed: bytes, and nanoseconds.
    """

    path: Path
    shown: str
    name: str
    size: int
    modified: int

    def check_unchanged(self) -> None:
        """The file must be the one that the job was planned for.

        Raises:
            UserError: it was written again meanwhile.
        """
        try:
            stat = self.path.stat()
        except OSError as error:
            raise UserError(f"{self.shown}: cannot be read: {error.strerror}") from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.modified):
            raise UserError(f"{self.shown}: was changed since this job began; start anew with --overwrite")


@dataclass(frozen=True)
class Task:
    """A part of the input that one worker cleans in one go.

    Attributes:
        name: of the shard it makes, without ending.
        file: number of the input file.
        source: the file and how to read it.
        start, end: a range of bytes or row groups; no end means the file's.
        part, parts: which of how many parts of a file of JSON objects this is; where those begin is found by the
            stage `scan`, so `start` and `end` say nothing.
        size: bytes on disk, for progress.
    """

    name: str
    file: int
    source: Source
    start: int
    end: int | None
    part: int
    parts: int
    size: int

    @property
    def scanned(self) -> bool:
        """Whether the range is found by the stage `scan`."""
        return self.parts > 1 and self.source.form == "objects"


def find_inputs(paths: Sequence[Path]) -> list[InputFile]:
    """The files that `--input` stands for, in order; plain text in folders (a README) is left out.

    Raises:
        UserError: a path is missing, named twice, or a folder holds no data file.
    """
    named = {path.resolve() for path in paths}
    files = [
        path for path in expand_inputs(paths, allow_empty=True) if base_suffix(path) != _TEXT or path.resolve() in named
    ]
    if not files:
        raise UserError(f"--input {paths[0]}: holds plain text only; give .json, .jsonl or .parquet files")
    found = []
    for path, name in zip(files, _unique_names(files), strict=True):
        stat = path.stat()
        found.append(InputFile(path.resolve(), str(path), name, stat.st_size, stat.st_mtime_ns))
    return found


def _unique_names(paths: Sequence[Path]) -> list[str]:
    """A name for every file: without endings where that is unique, else with them, else with a number."""
    short = [_without_endings(path.name) for path in paths]
    names = (
        [name if short.count(name) == 1 else path.name for name, path in zip(short, paths, strict=True)]
        if (len(set(short)) < len(short))
        else short
    )
    taken = {_without_endings(name) for name in (REPORT, QUARANTINE, TIMINGS)}
    unique: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate in taken:
            candidate, number = f"{name}~{number}", number + 1
        taken.add(candidate)
        unique.append(candidate)
    return unique


def _without_endings(name: str) -> str:
    path = Path(name)
    if path.suffix.lower() in (".gz", ".zst"):
        path = path.with_suffix("")
    return path.stem or name


def plan_tasks(inputs: Sequence[InputFile], range_bytes: int) -> list[Task]:
    """The tasks of a job in the order of the shards they make.

    Args:
        inputs: the files.
        range_bytes: about how many bytes of a file one task takes.
    """
    return [task for number, file in enumerate(inputs) for task in _tasks_of(number, file, range_bytes)]


def _tasks_of(number: int, file: InputFile, range_bytes: int) -> Iterator[Task]:
    source = inspect_source(file.path)
    if source.form == "parquet":
        ranges = _row_group_ranges(row_group_sizes(file.path), range_bytes)
    elif source.compression:
        ranges = [(0, None, file.size)]
    else:
        parts = max(1, round(file.size / range_bytes))
        bounds = [file.size * part // parts for part in range(parts + 1)]
        ranges = [(start, end, end - start) for start, end in itertools.pairwise(bounds)]
        ranges[-1] = (bounds[-2], None, bounds[-1] - bounds[-2])
    for part, (start, end, size) in enumerate(ranges):
        name = file.name if len(ranges) == 1 else f"{file.name}-{part:05d}-of-{len(ranges):05d}"
        yield Task(name, number, source, start, end, part, len(ranges), size)


def _row_group_ranges(sizes: list[int], range_bytes: int) -> list[tuple[int, int | None, int]]:
    ranges: list[tuple[int, int | None, int]] = []
    start = held = 0
    for group, size in enumerate(sizes):
        if held and held + size > range_bytes:
            ranges.append((start, group, held))
            start, held = group, 0
        held += size
    return [*ranges, (start, None, held)]
