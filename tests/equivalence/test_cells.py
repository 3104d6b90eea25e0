"""Cells of docs/equivalence.md equal one process: losses, gradient norms, tokens per expert, final weights.

Every switch, and of the layouts those that hold every pair of sizes; the report runs them all.
"""

import pytest

from tests.helpers.equivalence import Cell, Comparison, combinations, legal_layouts, refused_layouts
from tests.helpers.equivalence_cells import (
    REFUSED_SWITCHES,
    all_cells,
    cells_under_test,
    covering_layouts,
    pairs,
    refused_switches,
)

CELLS = cells_under_test()


@pytest.mark.parametrize("cell", CELLS, ids=[f"{cell.group}: {cell.name}" for cell in CELLS])
def test_cell_equals_one_process(cell: Cell, comparison: Comparison) -> None:
    found = comparison.measure(cell)
    assert found.failures(cell.tolerance) == []


def test_every_combination_is_in_the_grid_or_refused_with_an_error() -> None:
    legal, refused = legal_layouts(), refused_layouts()
    assert len(combinations()) == 216
    assert len(legal) + sum(map(len, refused.values())) == 216
    assert all(message.startswith("--") and "must divide the number of processes" in message for message in refused)


def test_what_is_refused_needs_more_ranks() -> None:
    """No layout is refused for any other reason: each needs a number of processes that the ranks are no multiple of."""
    for layouts in refused_layouts().values():
        for layout in layouts:
            dense = layout.tensor * layout.stages * layout.context
            experts = layout.expert * layout.expert_tensor * layout.stages
            assert layout.ranks % dense or layout.ranks % experts, layout.name
    for layout in legal_layouts():
        assert layout.data >= 1


def test_names_are_unique() -> None:
    names = [(cell.group, cell.name) for cell in all_cells()]
    assert len(set(names)) == len(names)


def test_every_pair_of_sizes_is_tested() -> None:
    """Pairs such as TP2 with CP2, or EP4 with DP2, that fit four ranks at all."""
    grid = [layout for layout in legal_layouts() if layout.ranks > 1]
    chosen = covering_layouts()
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, grid))
    assert len(chosen) < len(grid) / 2
    assert {cell.name for cell in CELLS if cell.group == "grid"} == {layout.name for layout in chosen}


def test_switches_that_are_not_in_the_table_are_refused() -> None:
    messages = refused_switches()
    assert set(messages) == set(REFUSED_SWITCHES)
    assert all(message.startswith("--") for message in messages.values())


def test_the_references_train(comparison: Comparison) -> None:
    """Losses fall, every token reaches an expert, every tensor moves."""
    reference = comparison.reference("pyramid-residual")
    (curve,) = reference.curves
    assert curve.losses[-1] < curve.losses[0] - 0.2
    for loads in curve.loads:
        assert [len(loads[2]), len(loads[4])] == [4, 8]
        assert sum(loads[2]) == sum(loads[4]) == 8 * 32
    for key, tensor in reference.end.items():
        assert abs(tensor - reference.start[key]).max() > 1e-4, key
