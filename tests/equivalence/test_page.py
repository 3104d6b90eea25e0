"""docs/equivalence.md lists exactly the cells that the tests run; the numbers are the report's."""

import re
from pathlib import Path

import pytest

from tests.equivalence_report import BEGIN, END, REFUSED, groups, layout_row, listed, main, switch_row
from tests.helpers.bf16_band import BAND, RUNS, SPREAD
from tests.helpers.equivalence import DEFAULT_EPSILON, FP32, legal_layouts, refused_layouts
from tests.helpers.equivalence_cells import refused_switches
from tests.helpers.equivalence_faults import FAULTS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "equivalence.md").read_text(encoding="utf-8")
MADE = PAGE.split(BEGIN)[1].split(END)[0]


def rows(heading: str, table: int = 0) -> list[list[str]]:
    """The rows of a section's table, without its head."""
    section = MADE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\|\n)+", section + "\n", re.MULTILINE)
    return [[word.strip() for word in line.strip("|").split(" | ")] for line in tables[table].splitlines()[2:]]


def test_the_grid_is_on_the_page() -> None:
    *listed_rows, largest = rows("The grid")
    expected = [layout_row(layout) for layout in legal_layouts() if layout.ranks > 1]
    assert [row[:7] for row in listed_rows] == expected
    assert largest[0] == "**largest**"


@pytest.mark.parametrize("group", [name for name in groups() if name != "grid"])
def test_switches_are_on_the_page(group: str) -> None:
    listed_rows = rows(group[0].upper() + group[1:])[:-1]
    assert [row[:2] for row in listed_rows] == [switch_row(cell) for cell in groups()[group]]


def test_what_is_on_the_page_passes() -> None:
    for group, cells in groups().items():
        tolerance = cells[0].tolerance
        for row in rows("The grid" if group == "grid" else group[0].upper() + group[1:]):
            loss, norm, weights = (float(word.strip("*")) for word in row[-4:-1])
            assert loss <= tolerance.loss
            assert norm <= tolerance.grad_norm
            assert weights <= tolerance.weights
            assert row[-1].strip("*") == "equal"


def test_faults_curves_and_refusals_are_on_the_page() -> None:
    faults = rows("That the comparison can fail")
    assert [row[:2] for row in faults] == [[name, fault.layout] for name, fault in FAULTS.items()]
    assert all(fault.found_by in row[2] for row, fault in zip(faults, FAULTS.values(), strict=True))
    curves = rows("200 steps in bf16 on real text")
    assert [row[0] for row in curves] == ["fp32, one process", *RUNS, *SPREAD]
    assert rows("Refused") == [[f"`{error}`", listed(found)] for error, found in refused_layouts().items()]
    assert rows("Refused", 1) == [[name, f"`{message}`"] for name, message in refused_switches().items()]
    assert len(REFUSED) == 2


def test_tolerances_in_the_text_are_those_of_the_tests() -> None:
    text = " ".join(PAGE.split(BEGIN)[0].split())
    assert (FP32.loss, FP32.grad_norm, FP32.weights) == (1e-6, 3e-6, 2e-4)
    assert "**Loss, 1e-6**" in text
    assert "**Gradient norm, 3e-6**" in text
    assert "**Weights, 2e-4 of" in text
    assert (DEFAULT_EPSILON.weights, DEFAULT_EPSILON.grad_norm) == (3e-3, 2e-5)
    assert "tolerance 3e-3), and the gradient norm to 2e-5" in text
    assert f"Band: smoothed {BAND.smoothed:.2%}, end {BAND.end:.2%}." in MADE


def test_a_page_is_only_written_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--output", "docs/equivalence.md", "--only", "grid"])
    assert "--output: needs every part" in capsys.readouterr().err
