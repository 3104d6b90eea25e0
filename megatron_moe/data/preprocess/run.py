"""Files of text to token files: plan the pieces, have them done, put them together, report."""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_moe import __version__
from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.data.command_line import byte_progress
from megatron_moe.data.files import atomic_write, expand_inputs
from megatron_moe.data.indexed import bin_path, token_dtype
from megatron_moe.data.pool import run_tasks
from megatron_moe.data.preprocess.assemble import Part, assemble
from megatron_moe.data.preprocess.job import Output, Preprocessing, PreprocessReport, Totals
from megatron_moe.data.preprocess.report import report_path
from megatron_moe.data.preprocess.tasks import Plan, Task
from megatron_moe.data.preprocess.work import PartWriter
from megatron_moe.data.preprocess.workspace import Done, Workspace, open_workspace
from megatron_moe.data.tokenizer.load import Tokenizer, load_tokenizer


def preprocess(
    inputs: Sequence[Path],
    output_prefix: Path,
    job: Preprocessing,
    *,
    workers: int = 1,
    shard_tokens: int | None = None,
    progress: bool | None = None,
) -> PreprocessReport:
    """Tokenize files in the given order into `<output_prefix>.bin` and `.idx`, a pair for every field.

    What is written does not depend on `workers`, and a pair appears only when all of it is written. A run that was
    stopped leaves `<output_prefix>.parts`; the same call goes on from there.

    Args:
        inputs: files and folders, see `expand_inputs`.
        output_prefix: path of the pair without ending.
        job: what to do with every document.
        workers: processes; 1 works in this one.
        shard_tokens: tokens a pair may have; what is over goes to the next one, and the names are numbered.
        progress: show a bar on stderr; None: if it is a terminal.

    Raises:
        UserError: a bad file or line, by name and number.
        ConfigError: a flag that cannot be.
    """
    started = time.monotonic()
    if workers < 1:
        raise ConfigError(f"--workers {workers}: must be at least 1")
    if shard_tokens is not None and shard_tokens < 1:
        raise ConfigError(f"--shard-tokens {shard_tokens}: must be at least 1")
    files = expand_inputs(inputs)
    tokenizer = load_tokenizer(job.data, job.vocab_size)
    options = job.options(tokenizer)
    where = str(bin_path(next(iter(job.prefixes(output_prefix).values()))))
    with open_workspace(output_prefix, options, where) as workspace:
        parts = _make_parts(files, job, tokenizer, workspace, workers, progress)
        totals = _totals(parts, job)
        outputs: list[Output] = []
        for place, (key, prefix) in enumerate(job.prefixes(output_prefix).items()):
            if totals[key].documents == 0:
                raise UserError(f"--input {files[0]}: every document is empty" + _in_field(key, job))
            own = [
                Part(
                    task.name,
                    place,
                    done.totals[place],
                    dict(zip(job.columns, done.checksums[place], strict=True)),
                    done.domains,
                )
                for task, done in parts.in_order()
            ]
            outputs += assemble(workspace, own, prefix, key, token_dtype(tokenizer.vocab_size), shard_tokens)
        report = PreprocessReport(
            totals=totals,
            outputs=tuple(outputs),
            inputs=tuple(files),
            parts=len(parts.done),
            resumed=parts.resumed,
            seconds=time.monotonic() - started,
            file=report_path(output_prefix),
        )
        _write_report(report, parts, options, shard_tokens, job.max_document_bytes)
    return report


@dataclass
class _Parts:
    """Finished pieces.

    Attributes:
        plan: all pieces, which of them lie beyond their file's end known after the last is done.
        done: finished pieces by name.
        resumed: how many of them an earlier run had done.
    """

    plan: Plan
    done: dict[str, Done] = field(default_factory=dict)
    resumed: int = 0

    def in_order(self) -> Iterator[tuple[Task, Done]]:
        """The pieces in the order of the input."""
        for task in self.plan:
            yield task, self.done[task.name]


def _make_parts(
    files: Sequence[Path],
    job: Preprocessing,
    tokenizer: Tokenizer,
    workspace: Workspace,
    workers: int,
    progress: bool | None,
) -> _Parts:
    parts = _Parts(Plan(files))
    total = sum(path.stat().st_size for path in files)
    # The tokenizer stays here: a process loads its own.
    arguments = (job, workspace) if workers > 1 else (job, workspace, tokenizer)
    with byte_progress(total, "tokenizing", progress) as bar:
        positions: dict[Path, int] = {}

        def finish(task: Task, done: Done) -> None:
            if done.ended:
                parts.plan.ended(task)
            parts.done[task.name] = done
            if task.compressed:
                bar.update(max(0, done.position - positions.get(task.path, 0)))
                positions[task.path] = max(done.position, positions.get(task.path, 0))
            else:
                bar.update(task.share)

        def left() -> Iterator[Task]:
            for task in parts.plan:
                done = workspace.read_done(task.name)
                if done is None:
                    yield task
                else:
                    parts.resumed += 1
                    finish(task, done)

        with contextlib.closing(run_tasks(PartWriter, arguments, left(), workers)) as results:
            for task, done in results:
                finish(task, done)
    parts.plan.check_unchanged()
    beyond = parts.done.keys() - {task.name for task in parts.plan}
    for name in beyond:
        del parts.done[name]
    return parts


def _totals(parts: _Parts, job: Preprocessing) -> dict[str, Totals]:
    totals = {key: Totals() for key in job.json_keys}
    for done in parts.done.values():
        for key, counts in zip(job.json_keys, done.totals, strict=True):
            totals[key] += counts
    return totals


def _in_field(key: str, job: Preprocessing) -> str:
    return f" in the field {key!r}" if len(job.json_keys) > 1 else ""


def _write_report(
    report: PreprocessReport, parts: _Parts, options: dict[str, Any], shard_tokens: int | None, max_document_bytes: int
) -> None:
    """Nothing of time or processes stands in it: the same input and options give the same file."""
    records: dict[Path, int] = {}
    for task, done in parts.in_order():
        records[task.path] = records.get(task.path, 0) + done.lines
    content = {
        "megatron_moe": __version__,
        "options": {**options, "max_document_bytes": max_document_bytes, "shard_tokens": shard_tokens},
        "inputs": [
            {"file": str(path), "bytes": path.stat().st_size, "records": records.get(path, 0)} for path in report.inputs
        ],
        "outputs": [{**asdict(output), "prefix": str(output.prefix)} for output in report.outputs],
        "totals": {
            key: {**asdict(totals), "chars_per_token": round(totals.chars_per_token, 6)}
            for key, totals in report.totals.items()
        },
    }
    atomic_write(report.file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
