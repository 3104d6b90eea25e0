"""The page of a run: one HTML file that needs no network, with the map of layers x experts over time."""

import numpy as np

from megatron_moe.data.html_report import Line, Page
from megatron_moe.training.run_report.heat_map import heat_map
from megatron_moe.training.run_report.history import LayerSum, LoadHistory, Series

_MOST_POINTS = 400
_TREND_FROM_POINTS = 40
# More layers than this are not all named in a legend.
_MOST_NAMES = 6


def render_page(metrics: dict[str, Series], loads: LoadHistory, title: str, unigram_entropy: float | None) -> str:
    """The whole page."""
    losses = metrics["lm_loss"]
    page = Page(title, f"{len(losses):,} logged steps, the last of them {losses.steps[-1]:,.0f}.")
    _numbers(page, metrics, unigram_entropy)
    _loss(page, metrics, unigram_entropy)
    if "tokens_per_second" in metrics:
        page.section("Throughput")
        page.lines("Tokens per second", [_line("", metrics["tokens_per_second"])], "step", from_zero=True)
    if loads.experts:
        _experts(page, loads)
    if "lr" in metrics:
        page.section("Learning rate")
        rates = [_line("" if "expert_lr" not in metrics else "all but experts", metrics["lr"])]
        if "expert_lr" in metrics:
            rates.append(_line("routed experts, the largest of any layer", metrics["expert_lr"], "var(--second)"))
        page.lines("At the beginning of each step", rates, "step", from_zero=True)
    return page.render()


def _line(name: str, series: Series, color: str = "var(--bar)", *, faint: bool = False, dots: bool = False) -> Line:
    shown = series.thinned(_MOST_POINTS)
    return Line(name, shown.steps.tolist(), shown.values.tolist(), color, faint=faint, dots=dots)


def _numbers(page: Page, metrics: dict[str, Series], unigram_entropy: float | None) -> None:
    losses, held, speed = metrics["lm_loss"], metrics.get("eval_lm_loss"), metrics.get("tokens_per_second")
    rows: list[tuple[str, float]] = [
        ("training loss, first logged step", float(losses.values[0])),
        ("training loss, last logged step", float(losses.values[-1])),
    ]
    if held is not None:
        rows.append((f"held-out loss at step {held.steps[-1]:,.0f}", float(held.values[-1])))
    if unigram_entropy is not None:
        rows.append(("unigram entropy", unigram_entropy))
    if speed is not None and np.isfinite(speed.values).any():
        rows.append(("median of tokens per second", float(np.nanmedian(speed.values))))
    page.table(("", "value"), rows)


def _loss(page: Page, metrics: dict[str, Series], unigram_entropy: float | None) -> None:
    losses = metrics["lm_loss"]
    with_trend = len(losses) >= _TREND_FROM_POINTS
    lines = [_line("training", losses, faint=with_trend)]
    if with_trend:
        lines.append(_line("training, smoothed", losses.smoothed(len(losses) // 25)))
    if "eval_lm_loss" in metrics:
        lines.append(_line("held-out", metrics["eval_lm_loss"], "var(--second)", dots=True))
    if unigram_entropy is not None:
        ends = [float(losses.steps[0]), float(losses.steps[-1])]
        name = f"unigram entropy {unigram_entropy:.2f}"
        lines.append(Line(name, ends, [unigram_entropy] * 2, "var(--ink)", dashed=True))
    page.section("Loss").lines("Nats per token", lines, "step")


def _experts(page: Page, loads: LoadHistory) -> None:
    page.section("Experts", "A row is an MoE layer, a cell one of its experts; hold the pointer over one to read it.")
    layers = list(loads.experts)
    # The map may leave fewer moments, and its charts have room for all.
    variations, overflows = _variations(loads), _overflows(loads)
    page.markup(heat_map(loads))
    page.lines("Load variation: standard deviation over mean", variations, "step", from_zero=True)
    if overflows:
        page.lines(
            "Percent of all assignments that found their expert full, mean over layers",
            overflows,
            "step",
            from_zero=True,
        )
    last = loads.frames[-1]
    page.section("Each layer", f"Of {last.label}.")
    page.table(
        ("layer", "experts", "load variation", "entropy / ln E", "least", "most", "dropped", "recycled"),
        [_row(layer, last.layers[layer]) for layer in layers if layer in last.layers],
    )


def _row(layer: int, load: LayerSum) -> tuple[int | float | str, ...]:
    shares = load.shares
    return (
        layer,
        len(shares),
        round(load.variation, 3),
        round(load.entropy, 4),
        round(float(shares.min()), 2),
        round(float(shares.max()), 2),
        f"{load.dropped / load.asked:.2%}",
        f"{load.recycled / load.asked:.2%}",
    )


def _variations(loads: LoadHistory) -> list[Line]:
    layers = list(loads.experts)
    lines = []
    for place, layer in enumerate(layers):
        over_time = loads.over_time(layer)
        named = len(layers) <= _MOST_NAMES or place in (0, len(layers) - 1)
        # From violet to yellow, deeper layers further along.
        hue = 280 - 230 * place / max(1, len(layers) - 1)
        lines.append(
            Line(
                f"layer {layer}" if named else "",
                [frame.middle for frame, _ in over_time],
                [load.variation for _, load in over_time],
                f"hsl({hue:.0f} 55% 50%)",
            )
        )
    return lines


def _overflows(loads: LoadHistory) -> list[Line]:
    """Dropped and recycled assignments, whichever there are."""
    lines = []
    middles = [frame.middle for frame in loads.frames]
    for name, color in (("dropped", "var(--second)"), ("recycled", "var(--bar)")):
        means = [
            100 * sum(getattr(load, name) / load.asked for load in frame.layers.values()) / len(frame.layers)
            for frame in loads.frames
        ]
        if any(means):
            lines.append(Line(name, middles, means, color))
    return lines
