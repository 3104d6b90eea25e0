"""The stage `clean`: one range of an input file through the rules of the recipe into one shard."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_moe.data.dedup import Decontaminator, Signer, signature_writer
from megatron_moe.data.files import atomic_file
from megatron_moe.data.wudao.document import Document
from megatron_moe.data.wudao.job import Job
from megatron_moe.data.wudao.objects import Fault
from megatron_moe.data.wudao.reader import Piece, PieceReader
from megatron_moe.data.wudao.rules.characters import views_of
from megatron_moe.data.wudao.shards import shard_writer
from megatron_moe.data.wudao.stats import CleanStats, Tally
from megatron_moe.data.wudao.tasks import Task

DECONTAMINATION = "decontamination"
TYPE_FIELD = "dataType"

Progress = Callable[[int], object]


def task_piece(job: Job, task: Task) -> Piece:
    """What a task reads: for parts of a file of objects the stage `scan` has found where they begin."""
    if not task.scanned:
        return Piece(task.source, task.start, task.end)
    cuts = job.result("scan", job.scanned_files.index(task.file))["cuts"]
    return Piece(task.source, cuts[task.part], cuts[task.part + 1])


def clean_task(job: Job, number: int, progress: Progress) -> dict[str, Any]:
    """Clean one range: writes its shard, signatures and quarantine; returns what was counted.

    Args:
        job: the job.
        number: which of its tasks.
        progress: told how many bytes on disk have been read so far.
    """
    task = job.tasks[number]
    stats = CleanStats(task.name)
    with ExitStack() as stack:
        report = stack.enter_context(_quarantine_writer(job, task, stats))
        write = stack.enter_context(shard_writer(job.cleaned_shard(task), job.where, quick=job.dedup != "none"))
        sign = _signer(job, task, stack)
        cleaner = BatchCleaner(job, stats)
        columns = (TYPE_FIELD, *job.recipe.keep_fields)
        for batch in PieceReader(task_piece(job, task), job.settings.reading, report, columns):
            documents = cleaner.clean(batch.documents)
            if documents:
                sign([document.text for document in documents])
                write(b"".join(cleaner.lines(documents)))
            progress(batch.bytes_read)
        job.inputs[task.file].check_unchanged()
        stats.read, stats.kept = cleaner.read.amount(), cleaner.kept.amount()
        if job.dedup != "none":
            np.save(stack.enter_context(atomic_file(tally_file(job, task), job.where)), cleaner.kept.columns)
    return {"name": task.name, "types": cleaner.kept.types, **stats.as_dict()}


class BatchCleaner:
    """Applies a job's recipe to batches of documents and counts what happens.

    Args:
        job: the job.
        stats: what is counted there.
    """

    def __init__(self, job: Job, stats: CleanStats) -> None:
        self._recipe = job.recipe
        self._stats = stats
        self._decontaminator = _decontaminator(job)
        self.read = Tally()
        self.kept = Tally()

    def clean(self, documents: list[Document]) -> list[Document]:
        """The documents that remain, changed by the rules."""
        stats, apply = self._stats, self._recipe.apply
        _count(self.read, documents)
        kept: list[Document] = []
        numbers: list[int] = []
        first = stats.number
        views = (
            views_of([document.text for document in documents]) if self._recipe.uses_views else [None] * len(documents)
        )
        for number, (document, view) in enumerate(zip(documents, views, strict=True), first):
            stats.number = number
            if apply(document, stats, view):
                kept.append(document)
                numbers.append(number)
        if self._decontaminator and kept:
            kept = self._decontaminated(kept, numbers, self._decontaminator)
        _count(self.kept, kept)
        stats.number = first + len(documents)
        return kept

    def _decontaminated(
        self, documents: list[Document], numbers: list[int], decontaminator: Decontaminator
    ) -> list[Document]:
        found = decontaminator.find([document.text for document in documents])
        for contamination, number, document in zip(found, numbers, documents, strict=True):
            if contamination is not None:
                self._stats.number = number
                self._stats.dropped(DECONTAMINATION, contamination.file, document.text)
        return [document for document, contamination in zip(documents, found, strict=True) if contamination is None]

    def lines(self, documents: list[Document]) -> Iterator[bytes]:
        """The documents as lines of the shard."""
        record = self._recipe.record.of
        for document in documents:
            yield orjson.dumps(record(document), default=str, option=orjson.OPT_APPEND_NEWLINE)


def _count(tally: Tally, documents: list[Document]) -> None:
    tally.add([document.text for document in documents], [document.meta.get(TYPE_FIELD) for document in documents])


def _decontaminator(job: Job) -> Decontaminator | None:
    options = job.recipe.decontamination
    return Decontaminator(options) if options.files else None


def _signer(job: Job, task: Task, stack: ExitStack) -> Callable[[list[str]], object]:
    """What makes signatures of the kept texts, where documents will be compared."""
    if job.dedup == "none":
        return lambda texts: None
    signer = Signer(job.near)
    writer = stack.enter_context(signature_writer(signature_file(job, task), job.near))
    return lambda texts: writer.add(signer.sign(texts))


def signature_file(job: Job, task: Task) -> Path:
    """The signatures of a task's shard."""
    return job.scratch("clean", f"{task.name}.sig")


def tally_file(job: Job, task: Task) -> Path:
    """Lengths and types of the documents in a task's shard."""
    return job.scratch("clean", f"{task.name}.tally.npy")


def quarantine_file(job: Job, task: Task) -> Path:
    """What could not be read in a task's range."""
    return job.scratch("clean", f"{task.name}.quarantine.jsonl")


@contextmanager
def _quarantine_writer(job: Job, task: Task, stats: CleanStats) -> Iterator[Callable[[Fault], None]]:
    place = "row" if task.source.form == "parquet" else "offset"
    shown = job.inputs[task.file].shown
    with atomic_file(quarantine_file(job, task), job.where) as stream:

        def report(fault: Fault) -> None:
            entry = {
                "file": shown,
                place: fault.offset,
                "rows" if place == "row" else "bytes": fault.size,
                "reason": fault.reason,
                "detail": fault.detail,
                "kept": fault.kept,
                "head": fault.head.decode("utf-8", "backslashreplace"),
            }
            stats.faults[f"{fault.reason}, kept" if fault.kept else fault.reason] += 1
            stream.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))

        yield report
