"""200 steps in bf16 on real text stay in a band around fp32, in three layouts."""

from pathlib import Path

import pytest

from tests.helpers.bf16_band import BAND, RUNS, STEPS, drift, measure_drifts

WRONG = "fp32, half the learning rate"


@pytest.mark.slow
def test_bf16_stays_in_the_band(tmp_path: Path) -> None:
    """And half the learning rate leaves it: a band that this passed would say nothing. All in one test, as curves are
    dear."""
    drifts = measure_drifts(tmp_path, [*RUNS, WRONG])
    assert {name: drifts[name].failures(BAND) for name in RUNS} == {name: [] for name in RUNS}
    assert len(drifts[WRONG].failures(BAND)) == 2
    for name in RUNS:
        assert drifts[name].final_loss < drifts[name].first_loss - 1.2, f"{name} learns nothing"


def test_the_measure() -> None:
    """A curve that runs 1 % above another is off by just that; a jump in one step is divided by the window."""
    reference = [7.0 - step / 100 for step in range(STEPS)]
    above = drift([1.01 * loss for loss in reference], reference)
    assert above.smoothed == pytest.approx(0.01)
    assert above.end == pytest.approx(0.01)
    assert above.final_loss == pytest.approx(1.01 * (reference[-1] + 19 / 200))
    assert len(above.failures(BAND)) == 2
    jump = [loss + (step == 120) for step, loss in enumerate(reference)]
    assert drift(jump, reference).smoothed == pytest.approx(1 / 20 / 5.705)
    assert drift(jump, reference).end == 0
    assert drift(reference, reference).failures(BAND) == []
