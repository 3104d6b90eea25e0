"""A run's files are read whole and exactly while they are short, and in bounded memory when they are long."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_moe.config.base import UserError
from megatron_moe.moe.load import LayerLoad
from megatron_moe.training.run_report.history import LoadHistory, Series, read_loads, read_metrics


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def history(rows: list[dict[str, Any]], most: int = 200) -> LoadHistory:
    found = LoadHistory(most)
    for row in rows:
        found.add(row, "here")
    return found.finish()


def load_row(step: int, layer: int, tokens: list[int], **more: Any) -> dict[str, Any]:
    return {"step": step, "layer": layer, "tokens": tokens, **more}


# ---- metrics


def test_the_later_line_of_a_step_counts(tmp_path: Path) -> None:
    rows = [{"step": 1, "lm_loss": 8.0}, {"step": 2, "lm_loss": 7.0}, {"step": 2, "lm_loss": 6.0}, {"step": 3}]
    series = read_metrics(write_lines(tmp_path / "metrics.jsonl", rows))
    assert list(series) == ["lm_loss"]
    assert (series["lm_loss"].steps.tolist(), series["lm_loss"].values.tolist()) == ([1, 2], [8.0, 6.0])


def test_a_line_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "lm_loss": 2.0}\n{"step": 2, "lm_l', encoding="utf-8")
    assert read_metrics(path)["lm_loss"].steps.tolist() == [1]


def test_what_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    rows = [{"step": step, "lm_loss": loss} for step, loss in enumerate([4.0, float("nan"), 1e308, 2.0])]
    losses = read_metrics(write_lines(tmp_path / "metrics.jsonl", rows))["lm_loss"]
    np.testing.assert_array_equal(losses.values, [4.0, np.nan, np.nan, 2.0])
    assert losses.thinned(2).values.tolist() == [4.0, 2.0]
    assert losses.smoothed(1).values.tolist() == [4.0, 4.0, 2.0, 2.0]


def test_smoothing_keeps_a_line_straight_and_its_start() -> None:
    line = np.arange(50.0)
    smooth = Series(line, line).smoothed(5).values
    assert smooth[0] == 0.0
    assert np.allclose(smooth[:45], line[:45])


def test_thinning_takes_means() -> None:
    line = np.arange(1000.0)
    thin = Series(line, 2 * line).thinned(10)
    assert thin.steps.tolist() == [49.5 + 100 * place for place in range(10)]
    assert thin.values.tolist() == (2 * thin.steps).tolist()
    assert len(Series(line, line).thinned(7)) == 7
    assert np.allclose(Series(line, line).thinned(1000).values, line)


# ---- loads


def test_shares_are_relative_to_an_even_one() -> None:
    loads = history([load_row(1, 2, [1, 1, 1, 1]), load_row(2, 2, [6, 2, 0, 0]), load_row(3, 2, [0, 0, 0, 0])])
    assert [frame.layers[2].shares.tolist() for frame in loads.frames] == [[1, 1, 1, 1], [3, 1, 0, 0], [1, 1, 1, 1]]
    assert [frame.label for frame in loads.frames] == ["step 1", "step 2", "step 3"]


def test_numbers_are_those_that_training_reports() -> None:
    """Also of a run that wrote neither dropped nor recycled."""
    load = LayerLoad(4, [5, 1, 2], dropped=2, recycled=1)
    (frame,) = history([{"step": 7} | load.row(), load_row(7, 2, [3, 1])]).frames
    shares = load.shares()
    assert frame.layers[4].variation == pytest.approx(shares["load_cv"])
    assert frame.layers[4].entropy == pytest.approx(shares["load_entropy"])
    assert frame.layers[4].dropped / frame.layers[4].asked == shares["dropped_share"]
    assert frame.layers[4].recycled / frame.layers[4].asked == shares["recycled_share"]
    assert (frame.layers[2].dropped, frame.layers[2].recycled) == (0, 0)


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 20, 21, 57, 1000])
def test_a_long_run_becomes_few_frames_and_loses_nothing(steps: int) -> None:
    rows = [load_row(10 * step, layer, [step, 1], dropped=step % 3) for step in range(1, steps + 1) for layer in (2, 6)]
    loads = history(rows, most=10)
    assert min(steps, 5) <= len(loads.frames) <= 10
    assert sum(frame.steps for frame in loads.frames) == steps
    assert loads.frames[0].first == 10
    assert loads.frames[-1].last == 10 * steps
    for before, after in zip(loads.frames, loads.frames[1:], strict=False):
        assert after.first == before.last + 10
    for layer in (2, 6):
        sums = [frame.layers[layer] for frame in loads.frames]
        assert sum(load.tokens for load in sums).tolist() == [steps * (steps + 1) / 2, steps]
        assert sum(load.dropped for load in sums) == sum(step % 3 for step in range(1, steps + 1))
        assert [load.steps for load in sums] == [frame.steps for frame in loads.frames]


def test_a_run_that_went_back_writes_over_what_it_had() -> None:
    first = [load_row(step, layer, [step, 0]) for step in (1, 2, 3, 4) for layer in (2, 4)]
    again = [load_row(step, layer, [0, step]) for step in (3, 4, 5) for layer in (2, 4)]
    loads = history(first + again)
    assert [frame.first for frame in loads.frames] == [1, 2, 3, 4, 5]
    for layer in (2, 4):
        tokens = [frame.layers[layer].tokens.tolist() for frame in loads.frames]
        assert tokens == [[1, 0], [2, 0], [0, 3], [0, 4], [0, 5]]
    twice = history([load_row(1, 2, [1, 0]), load_row(1, 2, [0, 1])])
    assert [frame.layers[2].tokens.tolist() for frame in twice.frames] == [[0, 1]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"dropped": -1}, "here: dropped is '-1', expected a number of assignments"),
        ({"recycled": float("nan")}, "here: recycled is 'nan', expected a number of assignments"),
        ({"recycled": "many"}, "here: recycled is 'many', expected a number"),
        ({"tokens": [1, 2, 3]}, "here: layer 2 has another number of experts than before"),
    ],
)
def test_what_is_wrong_is_named(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        history([load_row(1, 2, [1, 1]), load_row(2, 2, [1, 1]) | more])
    assert str(raised.value) == message


def test_memory_does_not_grow_with_the_run(tmp_path: Path) -> None:
    """The same for twice the steps, and less than the file."""
    tokens = json.dumps(list(range(1000, 1064)))
    path = tmp_path / "expert_load.jsonl"
    peaks = []
    for steps in (150, 300):
        with path.open("w", encoding="utf-8") as stream:
            for step in range(steps):
                for layer in range(12):
                    stream.write(f'{{"step": {step}, "layer": {layer}, "tokens": {tokens}, "dropped": 1}}\n')
        tracemalloc.start()
        try:
            assert 9 < len(read_loads(path, most=20).frames) <= 20
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < path.stat().st_size
    assert peaks[1] < 1.2 * peaks[0]
