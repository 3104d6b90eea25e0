"""The picture of a run (PNG): loss, throughput, load variation, dropped assignments, and each layer's load over time.

Needs matplotlib, which is imported here only.
"""

import math
from typing import TYPE_CHECKING

import numpy as np

from megatron_moe.training.run_report.history import LoadHistory, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure, SubFigure

_TRAIN, _TREND, _EVAL, _UNIGRAM, _SECOND = "#9ecae1", "#08519c", "#d94801", "#636363", "#238b45"
_TREND_FROM_POINTS = 40
_MOST_POINTS = 1500
_MAX_EXPERT_LABELS = 8
# More layers than this are told apart by the colour bar's ends rather than by name.
_MOST_NAMES = 6


def draw(metrics: dict[str, Series], loads: LoadHistory, title: str, unigram_entropy: float | None) -> "Figure":
    """The whole picture."""
    from matplotlib.figure import Figure

    columns = min(3, len(loads.experts)) or 1
    rows = math.ceil(len(loads.experts) / columns)
    heights = [3.6, 2.5] + ([2.1 * rows + 0.5] if loads.experts else [])
    figure = Figure(figsize=(11, sum(heights) + 0.4), layout="constrained", dpi=130)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_loss(parts[0].subplots(), metrics, unigram_entropy)
    below = parts[1].subplots(1, 3 if loads.experts else 1, squeeze=False)[0]
    _draw_throughput(below[0], metrics.get("tokens_per_second"))
    if loads.experts:
        _draw_variation(below[1], loads)
        _draw_overflow(below[2], loads)
        _draw_loads(parts[2], loads, rows, columns)
    return figure


def _finish(axes: "Axes", ylabel: str) -> None:
    axes.set(xlabel="step", ylabel=ylabel)
    axes.margins(x=0.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_loss(axes: "Axes", metrics: dict[str, Series], unigram_entropy: float | None) -> None:
    losses = metrics["lm_loss"]
    with_trend = len(losses) >= _TREND_FROM_POINTS
    shown = losses.thinned(_MOST_POINTS)
    axes.plot(shown.steps, shown.values, color=_TRAIN if with_trend else _TREND, linewidth=1.2, label="training")
    if with_trend:
        trend = losses.smoothed(len(losses) // 25).thinned(_MOST_POINTS)
        axes.plot(trend.steps, trend.values, color=_TREND, linewidth=2, label="training, smoothed")
    held = metrics.get("eval_lm_loss")
    if held is not None:
        axes.plot(held.steps, held.values, "o-", color=_EVAL, markersize=5, linewidth=1.2, label="held-out")
        if np.isfinite(held.values[-1]):
            axes.annotate(
                f"{held.values[-1]:.2f}",
                (held.steps[-1], held.values[-1]),
                xytext=(0, 11),
                textcoords="offset points",
                ha="right",
                color=_EVAL,
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
    if unigram_entropy is not None:
        label = f"unigram entropy {unigram_entropy:.2f}"
        axes.axhline(unigram_entropy, color=_UNIGRAM, linestyle="--", linewidth=1.4, label=label)
    _finish(axes, "loss (nats per token)")
    axes.legend(frameon=False, loc="upper right")


def _draw_throughput(axes: "Axes", speed: Series | None) -> None:
    axes.set_title("Throughput", fontsize=10)
    if speed is not None:
        shown = speed.thinned(_MOST_POINTS)
        axes.plot(shown.steps, shown.values, color=_SECOND, linewidth=1.0)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _finish(axes, "tokens per second")


def _draw_variation(axes: "Axes", loads: LoadHistory) -> None:
    from matplotlib import colormaps

    axes.set_title("Load variation (standard deviation over mean)", fontsize=10)
    layers = list(loads.experts)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for place, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        over_time = loads.over_time(layer)
        named = len(layers) <= _MOST_NAMES or place in (0, len(layers) - 1)
        axes.plot(
            [frame.middle for frame, _ in over_time],
            [load.variation for _, load in over_time],
            color=colour,
            linewidth=1.2,
            label=f"layer {layer}" if named else None,
        )
    axes.set_ylim(bottom=0)
    _finish(axes, "")
    axes.legend(frameon=False, fontsize=8)


def _draw_overflow(axes: "Axes", loads: LoadHistory) -> None:
    axes.set_title("Dropped and recycled, mean over layers", fontsize=10)
    middles = [frame.middle for frame in loads.frames]
    for name, colour in (("dropped", _EVAL), ("recycled", _TREND)):
        means = [
            sum(getattr(load, name) / load.asked for load in frame.layers.values()) / len(frame.layers)
            for frame in loads.frames
        ]
        label = name if any(means) else f"{name}: none"
        axes.plot(middles, means, color=colour, linewidth=1.4, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    _finish(axes, "")
    axes.legend(frameon=False, fontsize=8)


def _draw_loads(part: "SubFigure", loads: LoadHistory, rows: int, columns: int) -> None:
    part.suptitle("Expert load: tokens of an expert over an even share", fontsize=11)
    grid = part.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in grid.flat[len(loads.experts) :]:
        axes.set_visible(False)
    for position, layer in enumerate(loads.experts):
        axes = grid.flat[position]
        mesh = _draw_layer(axes, layer, loads)
        if position % columns == 0:
            axes.set_ylabel("expert")
        if position + columns >= len(loads.experts):
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
    bar = part.colorbar(mesh, ax=grid, ticks=[0, 0.5, 1, 1.5, 2], pad=0.015, aspect=22)
    bar.ax.set_yticklabels(["0", "0.5", "1 even", "1.5", "2 or more"])
    bar.outline.set_visible(False)


def _draw_layer(axes: "Axes", layer: int, loads: LoadHistory) -> "QuadMesh":
    from matplotlib.colors import TwoSlopeNorm

    over_time, experts = loads.over_time(layer), loads.experts[layer]
    shares = np.array([load.shares for _, load in over_time]).T
    # A column reaches halfway to its neighbours, as steps need not be evenly apart.
    middles = (
        np.array([frame.last for frame, _ in over_time[:-1]], dtype=np.float64)
        + np.array([frame.first for frame, _ in over_time[1:]], dtype=np.float64)
    ) / 2
    start, end = over_time[0][0].first, over_time[-1][0].last
    first = start - (middles[0] - over_time[0][0].last if len(middles) else 0.5)
    last = end + (over_time[-1][0].first - middles[-1] if len(middles) else 0.5)
    mesh = axes.pcolormesh(
        np.concatenate([[first], middles, [last]]),
        np.arange(experts + 1) - 0.5,
        shares,
        cmap="RdBu_r",
        norm=TwoSlopeNorm(1.0, 0.0, 2.0),
        rasterized=True,
    )
    dropped = sum(load.dropped for _, load in over_time)
    axes.set_title(f"layer {layer}: {experts} experts" + (f", {dropped:,.0f} dropped" if dropped else ""), fontsize=10)
    axes.set_yticks(range(0, experts, math.ceil(experts / _MAX_EXPERT_LABELS)))
    axes.invert_yaxis()
    return mesh
