"""A cleaning job: its inputs, its recipe, its folder, and the list of its stages and tasks.

Everything a worker on any machine needs stands in OUTPUT/.work/job.json. What was done is known by the markers that
tasks write last; all of them carry the job's fingerprint, so work for another recipe or input is never taken up.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_moe.config.base import UserError, disk_error
from megatron_moe.data.dedup import NearDedup
from megatron_moe.data.files import atomic_write
from megatron_moe.data.wudao.reader import ReadOptions
from megatron_moe.data.wudao.recipe import Recipe, load_recipe
from megatron_moe.data.wudao.shards import Compression, shard_file
from megatron_moe.data.wudao.source import Source
from megatron_moe.data.wudao.tasks import PAGE, QUARANTINE, REPORT, TIMINGS, InputFile, Task, find_inputs, plan_tasks

# Raise it when the same input and recipe give other output.
VERSION = 1
Dedup = Literal["none", "exact", "near"]
StageName = Literal["scan", "clean", "match", "decide", "write", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)
_WORK = ".work"


@dataclass(frozen=True)
class Settings:
    """What the user asked for, beside inputs and output.

    Attributes:
        recipe: a name or a file, see `load_recipe`.
        changes: what the command line changes in the recipe: settings of `load_recipe`.
        reading: see `ReadOptions`.
        range_bytes: bytes of the input that one task takes, about.
        compression: of the shards.
        folder: where relative paths in recipe and changes begin; does not decide the output.
    """

    recipe: str
    changes: tuple[str, ...] = ()
    reading: ReadOptions = field(default_factory=ReadOptions)
    range_bytes: int = 256 << 20
    compression: Compression = "zst"
    folder: str = "."


@dataclass(frozen=True)
class Job:
    """One cleaning job.

    Attributes:
        output: the folder it writes.
        settings: what was asked for.
        inputs: the input files, in order.
        tasks: the tasks of the stages `clean` and `write`, in the order of the shards.
        parts: fingerprints of the inputs, the recipe and the other settings, by what a user calls them.
    """

    output: Path
    settings: Settings
    inputs: tuple[InputFile, ...]
    tasks: tuple[Task, ...]
    parts: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """Names all that decides the output."""
        return _digest(dict(self.parts))

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The rules, built once a process."""
        return load_recipe(self.settings.recipe, self.settings.changes)

    @property
    def dedup(self) -> Dedup:
        """What the recipe compares."""
        if self.recipe.near_dedup:
            return "near"
        return "exact" if self.recipe.exact_dedup else "none"

    @property
    def near(self) -> NearDedup | None:
        """Parameters of near-deduplication, if there is any."""
        return self.recipe.near_dedup

    @functools.cached_property
    def scanned_files(self) -> list[int]:
        """Numbers of the input files whose ranges the stage `scan` finds."""
        return sorted({task.file for task in self.tasks if task.scanned})

    def stage_tasks(self, stage: StageName) -> int:
        """How many tasks a stage has; 0 where this job does not need it."""
        compared = self.dedup != "none"
        bands = self.near.bands if self.near else 0
        return {
            "scan": len(self.scanned_files),
            "clean": len(self.tasks),
            "match": (1 + bands) if compared else 0,
            "decide": int(compared),
            "write": len(self.tasks) if compared else 0,
            "report": 1,
        }[stage]

    @property
    def work(self) -> Path:
        """The folder for what is in progress."""
        return self.output / _WORK

    def scratch(self, stage: StageName, name: str) -> Path:
        """A file that a stage leaves for later ones."""
        return self.work / stage / name

    def cleaned_shard(self, task: Task) -> Path:
        """The shard after the rules: with nothing to compare it is the final one."""
        if self.dedup == "none":
            return self.final_shard(task)
        return self.scratch("clean", f"{task.name}.jsonl.zst")

    def final_shard(self, task: Task) -> Path:
        """The shard that the user gets."""
        return self.output / shard_file(task.name, self.settings.compression)

    def marker(self, stage: StageName, number: int) -> Path:
        """The file that says a task is done, and what it counted."""
        return self.work / stage / f"{number:06d}.done.json"

    def is_done(self, stage: StageName, number: int) -> bool:
        """Whether a task has been done, for this very job."""
        if stage == "report":
            return _read_parts(self.output / REPORT) == self.parts
        try:
            with self.marker(stage, number).open("rb") as stream:
                return self.fingerprint.encode() in stream.read(200)
        except FileNotFoundError:
            return False

    def finish_task(self, stage: StageName, number: int, result: Mapping[str, Any]) -> None:
        """Write the marker of a task; nothing of the task may be written after it."""
        content = json.dumps({"fingerprint": self.fingerprint, **result}, ensure_ascii=False)
        atomic_write(self.marker(stage, number), content, self.where)

    def result(self, stage: StageName, number: int) -> dict[str, Any]:
        """What a task that is done has counted."""
        values: dict[str, Any] = json.loads(self.marker(stage, number).read_bytes())
        return values

    @property
    def where(self) -> str:
        """How errors of writing name the place."""
        return f"--output {self.output}"

    def save(self) -> None:
        """Write the job where workers find it."""
        values = dataclasses.asdict(self)
        atomic_write(self.work / "job.json", json.dumps(values, ensure_ascii=False, default=str), self.where)


def load_job(output: Path) -> Job:
    """The job of an output folder, as a worker needs it.

    Raises:
        UserError: there is none, or it is damaged or of another version.
    """
    path = output / _WORK / "job.json"
    try:
        return _parse_job(output, json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: is damaged or of another version; give another folder for --output") from error


def _parse_job(output: Path, values: dict[str, Any]) -> Job:
    settings = values["settings"]
    settings["reading"] = ReadOptions(**settings["reading"])
    settings["changes"] = tuple(settings["changes"])
    return Job(
        output=output.resolve(),
        settings=Settings(**settings),
        inputs=tuple(InputFile(**{**file, "path": Path(file["path"])}) for file in values["inputs"]),
        tasks=tuple(
            Task(**{**task, "source": Source(**{**task["source"], "path": Path(task["source"]["path"])})})
            for task in values["tasks"]
        ),
        parts=values["parts"],
    )


def create_job(paths: Sequence[Path], output: Path, settings: Settings, overwrite: bool = False) -> tuple[Job, bool]:
    """Plan a job, or take up one that was begun in the output folder.

    Returns:
        The job, and whether it is finished already.

    Raises:
        UserError: inputs or recipe are wrong, or the folder holds something else.
    """
    inputs = find_inputs(paths)
    _check_output(output, paths)
    recipe = load_recipe(settings.recipe, settings.changes)
    options = {
        "version": VERSION,
        "reading": dataclasses.asdict(settings.reading),
        "range_bytes": settings.range_bytes,
        "compression": settings.compression,
    }
    parts = {
        "the input files": _digest([(file.name, file.size, file.modified) for file in inputs]),
        "the recipe": recipe.fingerprint,
        "the options (--text-key, --compression, ...)": _digest(options),
    }
    job = Job(output.resolve(), settings, tuple(inputs), tuple(plan_tasks(inputs, settings.range_bytes)), parts)
    _check_names(job)
    removed = overwrite and remove_job(job.output)
    finished = not removed and _compare_with_folder(job)
    if finished:
        _check_shards(job)
    else:
        # What the rules need shows now that it is missing, not in the first worker.
        recipe.prepare()
        job.save()
    return job, finished


def _check_output(output: Path, paths: Sequence[Path]) -> None:
    resolved = output.resolve()
    if resolved.exists() and not resolved.is_dir():
        raise UserError(f"--output {output}: is a file; give a folder")
    for path in paths:
        if path.is_dir() and (resolved == path.resolve() or path.resolve() in resolved.parents):
            raise UserError(
                f"--output {output}: lies in --input {path}, where it would be read too; give another folder"
            )


def _check_names(job: Job) -> None:
    """Long names of shards would fail in the middle of the job."""
    longest = max(
        (shard_file(task.name, job.settings.compression) for task in job.tasks), key=lambda name: len(name.encode())
    )
    if len(longest.encode()) > 200:
        raise UserError(f"--input: the file name {longest[:60]}... is too long to name shards after; rename the file")


def _compare_with_folder(job: Job) -> bool:
    """Whether the folder holds this job finished; False where it is empty, or holds this job begun."""
    if not job.output.exists():
        return False
    try:
        report, begun = _read_parts(job.output / REPORT), _read_parts(job.work / "job.json")
        empty = {path.name for path in job.output.iterdir()} <= {_WORK}
    except OSError as error:
        raise UserError(f"{job.where}: cannot be read: {error.strerror}") from error
    found = report or begun
    if found is None:
        if empty:
            return False
        raise UserError(f"{job.where}: holds other files; give an empty folder or a new one")
    changed = [name for name, digest in job.parts.items() if found.get(name) != digest]
    if changed:
        state = "a finished job" if report else "a job half done"
        raise UserError(
            f"{job.where}: holds {state} with other values of {', '.join(changed)}; give another folder, or "
            "--overwrite to delete that work and start anew"
        )
    return report is not None


def _check_shards(job: Job) -> None:
    for entry in json.loads((job.output / REPORT).read_bytes())["outputs"]:
        path = job.output / entry["file"]
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path}: is missing or was changed since the job was finished; --overwrite starts anew")


def _read_parts(path: Path) -> dict[str, str] | None:
    try:
        parts = json.loads(path.read_bytes())["parts"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a file of this tool; give another folder for --output") from error
    return parts if isinstance(parts, dict) else {}


def remove_job(output: Path) -> bool:
    """Delete what a job has written into a folder, and nothing else; returns whether there was one."""
    if not (output / _WORK / "job.json").exists():
        return False
    job = load_job(output)
    names = {REPORT, PAGE, QUARANTINE, TIMINGS, *(job.final_shard(task).name for task in job.tasks)}
    try:
        for path in sorted(output.iterdir()):
            # Also what a killed process left half written: NAME.PID.tmp.
            if path.name in names or (path.suffix == ".tmp" and path.name.rsplit(".", 2)[0] in names):
                path.unlink()
        shutil.rmtree(job.work)
    except OSError as error:
        raise disk_error(job.where, error) from error
    return True


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
