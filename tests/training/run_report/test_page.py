"""The page of a run is whole, safe, needs nothing from outside, and its map shows the numbers of the files."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from megatron_moe.training.run_report.heat_map import color_of, heat_map
from megatron_moe.training.run_report.history import LoadHistory, Series
from megatron_moe.training.run_report.page import render_page

NASTY = '</script><script>alert(1)</script> & "quoted" \'<b>'


class Seen(HTMLParser):
    """Elements in order, and whether they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def line(values: list[float]) -> Series:
    return Series(np.arange(1.0, len(values) + 1), np.array(values))


def pyramid(steps: int = 3, sizes: tuple[int, ...] = (4, 8)) -> LoadHistory:
    loads = LoadHistory()
    for step in range(1, steps + 1):
        for place, experts in enumerate(sizes, start=1):
            tokens = [step * (expert % 3) + 1 for expert in range(experts)]
            loads.add({"step": step, "layer": 2 * place, "tokens": tokens, "dropped": 3, "recycled": 1}, "here")
    return loads.finish()


def full_page(loads: LoadHistory) -> str:
    losses = line([float("nan"), *(8 / step for step in range(1, 60))])
    metrics = {"lm_loss": losses, "eval_lm_loss": line([5.0, 4.0]), "tokens_per_second": line([10.0, 20.0])}
    return render_page(metrics | {"lr": line([0.0, 1e-3]), "expert_lr": line([0.0, 3e-4])}, loads, NASTY, 7.1)


def frames_of(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="loads-data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, object] = json.loads(found[1])
    return data


def test_the_page_is_whole_and_needs_nothing_from_outside() -> None:
    page = full_page(pyramid())
    seen = Seen()
    seen.feed(page)
    assert not seen.open
    assert [attrs for tag, attrs in seen.tags if tag == "script"] == [
        {"type": "application/json", "id": "loads-data"},
        {},
    ]
    assert not re.search(r"(?<!-)\b(src|href|url)\s*[=(]|https?:", page)
    assert "alert(1)" in page
    assert "<script>alert" not in page
    for name in ("Loss", "Throughput", "Experts", "Learning rate", "recycled", "unigram entropy 7.10"):
        assert name in page


def test_without_a_script_the_last_moment_stays() -> None:
    """Cells have the colours of the last step's shares, layer by layer; the slider shows up by the script only."""
    loads = pyramid()
    page = heat_map(loads)
    cells = re.findall(r'<rect class="cell"[^>]* fill="([^"]+)"', page)
    last = loads.frames[-1].layers
    assert cells == [color_of(share) for layer in (2, 4) for share in last[layer].shares]
    assert len(set(cells)) == 6
    assert '<div id="loads-controls" hidden>' in page
    assert "<title>layer 4, expert 7: " in page


def test_the_script_gets_every_moment() -> None:
    loads = pyramid(steps=150)
    data = frames_of(heat_map(loads))
    assert data["labels"] == [f"step {step}" for step in range(1, 151)]
    assert data["layers"] == [2, 4]
    shares = [[(frame.layers[layer].shares * 100).round().tolist() for layer in (2, 4)] for frame in loads.frames]
    assert data["frames"] == shares


def test_a_layer_that_was_not_logged_leaves_a_hole() -> None:
    loads = pyramid()
    del loads.frames[-1].layers[2]
    page = full_page(loads)
    assert frames_of(page)["frames"][-1][0] is None  # type: ignore[index]
    assert page.count('fill="none"><title>') == 4


def test_a_wide_model_has_fewer_moments() -> None:
    loads = pyramid(steps=200, sizes=(256,) * 48)
    page = heat_map(loads)
    assert len(loads.frames) == 25
    assert len(page) < 6e6
    assert loads.frames[-1].last == 200


@pytest.mark.parametrize(
    ("share", "color"), [(0, "#2166ac"), (1, "#f7f7f7"), (2, "#b2182b"), (9, "#b2182b"), (0.5, "#8caed2")]
)
def test_colours(share: float, color: str) -> None:
    assert color_of(share) == color


def test_a_dense_run_has_no_map() -> None:
    page = full_page(LoadHistory().finish())
    assert "loads-data" not in page
    assert "Throughput" in page


def test_a_run_of_one_step_and_one_without_finite_losses() -> None:
    for losses in (line([3.0]), line([float("nan")] * 2)):
        page = render_page({"lm_loss": losses}, pyramid(steps=1), "run", None)
        assert page.endswith("</html>\n")
