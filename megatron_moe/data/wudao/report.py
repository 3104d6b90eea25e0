"""The last stage: what all tasks counted, as report.json and a page to read; everything unreadable in one quarantine.

Nothing in either depends on how many workers there were or when they ran; that stands in timings.json.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from megatron_moe import __version__
from megatron_moe.data.dedup import Decontaminator
from megatron_moe.data.files import atomic_file, atomic_write
from megatron_moe.data.wudao.clean import DECONTAMINATION, quarantine_file
from megatron_moe.data.wudao.job import STAGES, Job
from megatron_moe.data.wudao.report_page import render_page
from megatron_moe.data.wudao.shards import shard_lines, shown
from megatron_moe.data.wudao.stats import Amount, CleanStats, JsonObject, RuleStats, Samples, named_lengths
from megatron_moe.data.wudao.tasks import PAGE, QUARANTINE, REPORT, TIMINGS

_COPY = 1 << 20
_MOST_REASONS = 20


def write_report(job: Job) -> JsonObject:
    """Write quarantine, timings, page and report of a job whose other stages are done; the report comes last."""
    stats, dropped, documents = CleanStats(), Amount(), []
    samples = {"exact": Samples(), "near": Samples()}
    # Task by task: with their samples, the results of thousands of tasks would take much memory.
    for number in range(len(job.tasks)):
        result = CleanStats.from_dict(job.result("clean", number))
        stats.merge(result)
        documents.append(result.kept.documents)
        if job.stage_tasks("write"):
            copied = job.result("write", number)
            here = Amount(**copied["dropped"])
            dropped.merge(here)
            documents[-1] -= here.documents
            samples = {kind: Samples([*found.entries(), *copied["samples"][kind]]) for kind, found in samples.items()}
    written = Amount()
    written.merge(stats.kept)
    written.merge(dropped, -1)
    _write_quarantine(job, sum(stats.faults.values()))
    report: JsonObject = {
        "tool": f"megatron_moe {__version__} clean_wudao",
        "parts": dict(job.parts),
        "recipe": {"name": job.recipe.name, "fingerprint": job.recipe.fingerprint, "dedup": job.dedup},
        "inputs": [{"file": file.shown, "bytes": file.size} for file in job.inputs],
        "outputs": list(_outputs(job, documents)),
        "read": _amount(stats.read),
        "kept_by_rules": _amount(stats.kept),
        "written": _amount(written),
        "quarantine": {
            "entries": sum(stats.faults.values()),
            "reasons": dict(sorted(stats.faults.items())),
            "file": QUARANTINE if stats.faults else None,
        },
        "rules": list(_rules(job, stats)),
    }
    if job.recipe.decontamination.files:
        # How much of each file was compared, and how many of its texts are too short to be.
        sets = Decontaminator(job.recipe.decontamination).files
        report["evaluation_sets"] = [dataclasses.asdict(file) for file in sets]
    if job.stage_tasks("decide"):
        report["dedup"] = _dedup(job, samples)
    timings = _timings(job)
    atomic_write(job.output / TIMINGS, json.dumps(timings, indent=1), job.where)
    atomic_write(job.output / PAGE, render_page(report), job.where)
    atomic_write(job.output / REPORT, json.dumps(report, ensure_ascii=False, indent=1), job.where)
    return report


def _write_quarantine(job: Job, entries: int) -> None:
    if not entries:
        return
    with atomic_file(job.output / QUARANTINE, job.where) as output:
        for task in job.tasks:
            with quarantine_file(job, task).open("rb") as stream:
                while piece := stream.read(_COPY):
                    output.write(piece)


def _outputs(job: Job, documents: list[int]) -> Iterator[JsonObject]:
    for task, count in zip(job.tasks, documents, strict=True):
        path = job.final_shard(task)
        yield {"file": path.name, "documents": count, "bytes": path.stat().st_size}


def _amount(amount: Amount) -> JsonObject:
    by_type = {
        name: {"documents": documents, "characters": characters}
        for name, (documents, characters) in sorted(amount.by_type.items(), key=lambda item: (-item[1][0], item[0]))
        if documents
    }
    return {
        "documents": amount.documents,
        "characters": amount.characters,
        "bytes": amount.bytes,
        "lengths": named_lengths(amount.lengths),
        "by_type": by_type,
    }


def _rules(job: Job, stats: CleanStats) -> Iterator[JsonObject]:
    """Every rule in the order of the recipe, also those that found nothing."""
    names = [*dict.fromkeys(rule.name for rule in job.recipe.rules)]
    names += sorted(name for name in stats.rules if name not in names and name != DECONTAMINATION)
    if job.recipe.decontamination.files:
        names.append(DECONTAMINATION)
    for name in names:
        rule = stats.rules.get(name, RuleStats())
        changes = [sample for _, sample in rule.changes.entries()]
        drops = [{**sample, "after": None} for _, sample in rule.drops.entries()]
        yield {
            "rule": name,
            "changed": rule.changed,
            "dropped": rule.dropped,
            "characters_removed": rule.characters_removed,
            "reasons": dict(sorted(rule.reasons.items(), key=lambda item: (-item[1], item[0]))[:_MOST_REASONS]),
            "samples": changes + drops,
        }


def _dedup(job: Job, samples: dict[str, Samples]) -> JsonObject:
    """Numbers of deduplication, and pairs of a dropped text and the one that is kept for it."""
    chosen = {kind: [sample for _, sample in found.entries()] for kind, found in samples.items()}
    texts = _texts(job, [tuple(sample["kept"]) for entries in chosen.values() for sample in entries])
    shown_samples = {
        kind: [
            {
                "dropped": _place(job, *sample["dropped"]),
                "before": sample["before"],
                "kept": _place(job, *sample["kept"]),
                "after": texts[tuple(sample["kept"])],
            }
            for sample in entries
        ]
        for kind, entries in chosen.items()
    }
    near = job.near.as_dict() if job.near else None
    return {"near": near, **job.result("decide", 0)["dedup"], "samples": shown_samples}


def _place(job: Job, shard: int, row: int) -> str:
    return f"{job.tasks[shard].name} document {row} after the rules"


def _texts(job: Job, places: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
    """The beginnings of a few documents of cleaned shards."""
    wanted: dict[int, set[int]] = defaultdict(set)
    for shard, row in places:
        wanted[shard].add(row)
    found = {}
    for shard, rows in sorted(wanted.items()):
        last = max(rows)
        for row, line in enumerate(shard_lines(job.cleaned_shard(job.tasks[shard]))):
            if row in rows:
                found[shard, row] = shown(line)
            if row == last:
                break
    return found


def _timings(job: Job) -> JsonObject:
    """Seconds of all tasks of each stage, and how fast they were."""
    stages: JsonObject = {}
    for stage in STAGES[:-1]:
        seconds, processor = [], []
        for number in range(job.stage_tasks(stage)):
            result = job.result(stage, number)
            seconds.append(result["seconds"])
            processor.append(result["processor_seconds"])
        if seconds:
            stages[stage] = {
                "tasks": len(seconds),
                "seconds": round(sum(seconds), 3),
                "processor_seconds": round(sum(processor), 3),
                "longest_task_seconds": round(max(seconds), 3),
            }
    size = sum(file.size for file in job.inputs)
    busy = sum(stage["processor_seconds"] for stage in stages.values())
    return {
        "stages": stages,
        "input_bytes": size,
        "input_megabytes_per_processor_second": round(size / 1e6 / busy, 3) if busy else None,
    }


def read_report(output: Path) -> JsonObject:
    """The report of a finished job."""
    report: JsonObject = json.loads((output / REPORT).read_bytes())
    return report


def summary(report: JsonObject) -> str:
    """A few lines that say what a job did."""
    read, written = report["read"], report["written"]
    share = 100 * written["characters"] / read["characters"] if read["characters"] else 0.0
    lines = [
        f"{read['documents']:,} documents read, {written['documents']:,} written; "
        f"{written['characters']:,} of {read['characters']:,} characters ({share:.1f} %)"
    ]
    dropped = [f"{rule['rule']} {rule['dropped']:,}" for rule in report["rules"] if rule["dropped"]]
    if dropped:
        lines.append("dropped by rules: " + ", ".join(dropped))
    if "dedup" in report:
        lines.append(f"duplicates dropped: {report['dedup']['exact']:,} equal, {report['dedup']['near']:,} similar")
    if report["quarantine"]["entries"]:
        reasons = ", ".join(f"{name} {count:,}" for name, count in report["quarantine"]["reasons"].items())
        lines.append(f"not read as it stands, see {report['quarantine']['file']}: {reasons}")
    return "\n".join(lines)
