"""The page of a cleaning report that a person reads: charts of what came in and went out, and samples of each rule."""

from collections.abc import Sequence
from typing import Any

from megatron_moe.data.html_report import Page

_MOST_TYPES = 20
_MOST_SHARDS = 200


def render_page(report: dict[str, Any]) -> str:
    """The report as one HTML file."""
    recipe = report["recipe"]
    page = Page("Cleaned corpus", f"Recipe {recipe['name']}, duplicates: {recipe['dedup']}, by {report['tool']}.")
    _totals(page, report)
    _rules(page, report["rules"])
    if "evaluation_sets" in report:
        page.section("Evaluation sets", "Documents that hold text of these were dropped; runs are what is looked for.")
        rows = [(entry["name"], entry["texts"], entry["runs"], entry["short"]) for entry in report["evaluation_sets"]]
        page.table(("file", "texts", "runs", "texts shorter than a run"), rows)
    if "dedup" in report:
        _dedup(page, report["dedup"])
    _lengths(page, report)
    _types(page, report)
    if report["quarantine"]["entries"]:
        page.section("Not read as it stands", f"Each of these is a line of {report['quarantine']['file']}.")
        page.table(("reason", "entries"), list(report["quarantine"]["reasons"].items()))
    _files(page, report)
    return page.render()


def _totals(page: Page, report: dict[str, Any]) -> None:
    steps = [("read", report["read"]), ("left by the rules", report["kept_by_rules"]), ("written", report["written"])]
    rows = [(name, amount["documents"], amount["characters"], amount["bytes"]) for name, amount in steps]
    page.section("Totals").table(("", "documents", "characters", "bytes of text (UTF-8)"), rows)
    page.bars("Documents", [name for name, _ in steps], [amount["documents"] for _, amount in steps])
    page.bars("Characters", [name for name, _ in steps], [amount["characters"] for _, amount in steps])


def _rules(page: Page, rules: Sequence[dict[str, Any]]) -> None:
    page.section("Rules", "In the order in which they work. Characters of dropped documents count as removed.")
    rows = [(rule["rule"], rule["changed"], rule["dropped"], rule["characters_removed"]) for rule in rules]
    page.table(("rule", "documents changed", "documents dropped", "characters removed"), rows)
    # Rows of zeros would hide the bars.
    busy = [rule for rule in rules if rule["changed"] or rule["dropped"]]
    if busy:
        page.bars(
            "Documents",
            [rule["rule"] for rule in busy],
            [rule["changed"] for rule in busy],
            second=[rule["dropped"] for rule in busy],
            names=("changed", "dropped"),
        )
    shorter = [rule for rule in rules if rule["characters_removed"] > 0]
    if shorter:
        page.bars(
            "Characters removed",
            [rule["rule"] for rule in shorter],
            [rule["characters_removed"] for rule in shorter],
        )
    for rule in rules:
        if rule["reasons"]:
            page.table((f"{rule['rule']}: reasons (# for a number)", "documents"), list(rule["reasons"].items()))
        if rule["samples"]:
            samples = [(sample["before"], sample["after"]) for sample in rule["samples"]]
            page.before_after(f"{rule['rule']}, before and after", samples)


def _dedup(page: Page, dedup: dict[str, Any]) -> None:
    page.section("Duplicates", "Of each cluster the first document in the order of the input is kept.")
    numbers = [
        (name.replace("_", " "), value) for name, value in dedup.items() if isinstance(value, int) and value is not True
    ]
    page.table(("", "documents"), numbers)
    sizes = dedup.get("cluster_sizes", {})
    if sizes:
        page.bars("Clusters by number of documents", list(sizes), list(sizes.values()))
    for kind, samples in dedup["samples"].items():
        if samples:
            pairs = [(sample["before"], sample["after"]) for sample in samples]
            page.before_after(f"{kind} duplicates: dropped, and kept for it", pairs)


def _lengths(page: Page, report: dict[str, Any]) -> None:
    before, after = report["read"]["lengths"], report["written"]["lengths"]
    labels = list(before | after)
    page.section("Lengths").bars(
        "Documents by characters",
        labels,
        [before.get(label, 0) for label in labels],
        second=[after.get(label, 0) for label in labels],
        names=("read", "written"),
    )


def _types(page: Page, report: dict[str, Any]) -> None:
    before, after = report["read"]["by_type"], report["written"]["by_type"]
    labels = list(before)[:_MOST_TYPES]
    if labels == [""]:
        return

    def documents(amounts: dict[str, Any]) -> list[int]:
        return [amounts.get(label, {"documents": 0})["documents"] for label in labels]

    page.section("Types", "The field dataType of the records.").bars(
        "Documents by type",
        [label or "(none)" for label in labels],
        documents(before),
        second=documents(after),
        names=("read", "written"),
    )


def _files(page: Page, report: dict[str, Any]) -> None:
    page.section("Files")
    page.table(("input", "bytes"), [(file["file"], file["bytes"]) for file in report["inputs"][:_MOST_SHARDS]])
    rows = [(file["file"], file["documents"], file["bytes"]) for file in report["outputs"][:_MOST_SHARDS]]
    page.table(("output", "documents", "bytes"), rows)
    left = max(len(report["inputs"]), len(report["outputs"])) - _MOST_SHARDS
    if left > 0:
        page.paragraph(f"And {left:,} more, see report.json.")
