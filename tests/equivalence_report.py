"""Run every cell of the equivalence grid, print the largest deviation of each, and write docs/equivalence.md.

    python tests/equivalence_report.py
    python tests/equivalence_report.py --output docs/equivalence.md
    python tests/equivalence_report.py --only grid --only recompute

About ten minutes on two cores. Without --output the tables are printed only. The command fails if a cell is outside its
tolerance, a fault is not found, or a curve in bf16 leaves its band. What `--only` names: grid, the switches' groups,
faults, band.
"""

import argparse
import contextlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Run as a script, Python sees this folder only; ranks find the tests' helpers by the same path.
    sys.path[0] = str(ROOT)

from tests.helpers.bf16_band import BAND, RUNS, SPREAD, Drift, measure_drifts  # noqa: E402
from tests.helpers.equivalence import (  # noqa: E402
    Cell,
    Comparison,
    Deviation,
    Layout,
    Tolerance,
    legal_layouts,
    refused_layouts,
)
from tests.helpers.equivalence_cells import all_cells, refused_switches  # noqa: E402
from tests.helpers.equivalence_faults import FAULTS, what_is_found  # noqa: E402
from tests.helpers.tiny import write_tiny_data  # noqa: E402

BEGIN, END = "<!-- made by tests/equivalence_report.py -->", "<!-- end -->"
GRID = ("ranks", "TP", "PP", "EP", "ETP", "CP", "DP", "loss", "grad norm", "weights", "tokens per expert")
REFUSED = ("error", "combinations")
SWITCHES = ("switch and layout", "ranks", "loss", "grad norm", "weights", "tokens per expert")


class Report:
    """Lines of the page's generated part; printed as they come."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failures: list[str] = []

    def add(self, *lines: str) -> None:
        """Lines as they stand."""
        self.lines += lines
        print(*lines, sep="\n", flush=True)

    def heading(self, text: str) -> None:
        """A section."""
        self.add("", f"## {text}", "")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table whose rows may take their time."""
        self.add("| " + " | ".join(columns) + " |", "|" + "---|" * len(columns))
        for row in rows:
            self.add("| " + " | ".join(row) + " |")


def layout_row(layout: Layout) -> list[str]:
    """How a layout stands in the grid's table."""
    sizes = [layout.ranks, layout.tensor, layout.pipeline, layout.expert, layout.expert_tensor, layout.context]
    return [str(size) for size in (*sizes, layout.data)]


def switch_row(cell: Cell) -> list[str]:
    """How a switch stands in its group's table."""
    return [cell.name, str(cell.ranks)]


def short(value: float) -> str:
    """Two digits; 0 means equal bit for bit."""
    return f"{value:.1e}" if value else "0"


def result_row(found: Deviation) -> list[str]:
    """The measured part of a row."""
    return [*map(short, (found.loss, found.grad_norm, found.weights)), "equal" if found.loads else "differ"]


def tolerance_line(tolerance: Tolerance) -> str:
    """What passes, in a sentence."""
    measure = "largest element" if tolerance.measure == "largest" else "root mean square"
    return (
        f"Tolerance: loss {tolerance.loss:.0e}, grad norm {tolerance.grad_norm:.0e}, weights {tolerance.weights:.0e} "
        f"({measure})."
    )


def groups() -> dict[str, list[Cell]]:
    """Cells by group, in the order of the page."""
    found: dict[str, list[Cell]] = {}
    for cell in all_cells():
        found.setdefault(cell.group, []).append(cell)
    return found


def run_group(report: Report, comparison: Comparison, name: str, cells: list[Cell]) -> None:
    """One table of cells and, last, the largest of each column."""
    layouts = {layout.name: layout for layout in legal_layouts()}
    grid = name == "grid"
    report.heading("The grid" if grid else name[0].upper() + name[1:])
    report.add(tolerance_line(cells[0].tolerance), "")
    found: list[Deviation] = []

    def rows() -> Iterator[list[str]]:
        for cell in cells:
            with quiet():
                measured = comparison.measure(cell)
            found.append(measured)
            report.failures += [f"{cell.group}, {cell.name}: {text}" for text in measured.failures(cell.tolerance)]
            yield [*(layout_row(layouts[cell.name]) if grid else switch_row(cell)), *result_row(measured)]
        worst = [f"**{short(max(getattr(one, key) for one in found))}**" for key in ("loss", "grad_norm", "weights")]
        loads = "equal" if all(one.loads for one in found) else "differ"
        columns = len(GRID if grid else SWITCHES)
        yield ["**largest**", *[""] * (columns - 5), *worst, f"**{loads}**"]

    report.table(GRID if grid else SWITCHES, rows())


def run_faults(report: Report, comparison: Comparison) -> None:
    """The table of faults."""
    report.heading("That the comparison can fail")

    def rows() -> Iterator[list[str]]:
        for name, fault in FAULTS.items():
            with quiet():
                found = what_is_found(name, comparison)
            if not found:
                report.failures.append(f"fault not found: {name}")
            yield [name, fault.layout, "; ".join(found)]

    report.table(("fault put in on purpose", "layout", "found as"), rows())


def run_band(report: Report, folder: Path) -> None:
    """The table of bf16 curves."""
    report.heading("200 steps in bf16 on real text")
    with quiet():
        drifts = measure_drifts(folder, [*RUNS, *SPREAD])

    def row(name: str, drift: Drift) -> list[str]:
        return [name, f"{drift.final_loss:.3f}", f"{drift.smoothed:.2%}", f"{drift.end:+.2%}"]

    report.add(f"Band: smoothed {BAND.smoothed:.2%}, end {BAND.end:.2%}. The last runs are there to leave it.", "")
    report.table(("run", "mean loss of the last 20 steps", "smoothed", "end"), (row(*pair) for pair in drifts.items()))
    for name in RUNS:
        report.failures += [f"bf16, {name}: {text}" for text in drifts[name].failures(BAND)]


def listed(layouts: Iterable[Layout]) -> str:
    """Combinations that are refused with the same error."""
    return ", ".join(layout.name.split(": ")[1] for layout in layouts)


def refused_tables(report: Report) -> None:
    """What is not in the grid, and why."""
    report.heading("Refused")
    refused = refused_layouts()
    count = sum(map(len, refused.values()))
    report.add(
        f"{count} of the {count + len(legal_layouts())} combinations need another number of processes than 1, 2 or 4:",
        "",
    )
    report.table(REFUSED, ([f"`{message}`", listed(found)] for message, found in refused.items()))
    report.add("", "Switches that the configuration refuses on a CPU:", "")
    report.table(("switch", "error"), ([name, f"`{message}`"] for name, message in refused_switches().items()))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ranks print every step; here that would tear the tables. Errors still come."""
    sys.stdout.flush()
    saved = os.dup(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)


def versions() -> str:
    """What the numbers were measured with."""
    torch, core = (metadata.version(name).split("+")[0] for name in ("torch", "megatron-core"))
    return (
        f"Measured with torch {torch} and megatron-core {core} on a CPU "
        f"({platform.machine()}, one thread a rank, gloo). Numbers are relative deviations, the largest over steps, "
        "ranks and tensors."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page whose generated part is replaced")
    everything = [*groups(), "faults", "band", "refused"]
    parser.add_argument("--only", action="append", choices=everything, help="a part of it; may be repeated")
    args = parser.parse_args(argv)
    if args.output and args.only:
        parser.error("--output: needs every part; leave out --only")
    chosen, began, report = args.only or everything, time.monotonic(), Report()
    report.add("", versions())
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            comparison = Comparison(write_tiny_data(Path(folder)))
        for name, cells in groups().items():
            if name in chosen:
                run_group(report, comparison, name, cells)
        if "faults" in chosen:
            run_faults(report, comparison)
        if "band" in chosen:
            run_band(report, Path(folder) / "real")
        if "refused" in chosen:
            refused_tables(report)
    print(f"\n{time.monotonic() - began:.0f} s")
    for failure in report.failures:
        print(f"FAILED {failure}")
    if args.output and not report.failures:
        page = args.output.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        args.output.write_text(f"{before}{BEGIN}\n" + "\n".join(report.lines) + f"\n\n{END}{after}", encoding="utf-8")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
