"""Draw a run: its losses, and how its experts share the tokens.

    python tools/plot_run.py --run runs/demo --output runs/demo/run.png --unigram-entropy 7.14

reads metrics.jsonl and expert_load.jsonl of a run's directory (the --save of training) and writes one PNG. In
the panels below the loss, one per MoE layer, white is an even share; blue experts get less than that, red
ones more.
Needs matplotlib: pip install matplotlib
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.command_line import ToolParser, run_tool
from megatron_moe.data.files import atomic_file
from megatron_moe.data.rows import Row, counts, number, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure, SubFigure

_TRAIN, _TREND, _EVAL, _UNIGRAM = "#9ecae1", "#08519c", "#d94801", "#636363"
_TREND_FROM_POINTS = 40
_MAX_EXPERT_LABELS = 8


@dataclass
class LayerLoad:
    """One MoE layer's load.

    Attributes:
        counts: step -> [experts] tokens each expert got.
        dropped: step -> tokens that no expert had room for.
    """

    counts: dict[int, list[float]] = field(default_factory=dict)
    dropped: dict[int, float] = field(default_factory=dict)

    def shares(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Steps [N] in order, and [experts, N] each expert's tokens over an even share (1 = even)."""
        steps = np.array(sorted(self.counts), dtype=np.int64)
        counts = np.array([self.counts[step] for step in steps.tolist()], dtype=np.float64)
        totals = counts.sum(axis=1, keepdims=True)
        even = np.divide(counts * counts.shape[1], totals, out=np.ones_like(counts), where=totals > 0)
        return steps, even.T


def series(entries: list[Row], key: str, path: Path = Path("metrics.jsonl")) -> tuple[list[int], list[float]]:
    """Steps and values of a key in order; of a step that a resumed run logged again the later line counts.

    Raises:
        UserError: a value is no number.
    """
    values = {entry["step"]: number(entry[key], key, path) for entry in entries if entry.get(key) is not None}
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def loads_by_layer(entries: list[Row], path: Path) -> dict[int, LayerLoad]:
    """Expert load per MoE layer, in the order of the layers.

    Raises:
        UserError: a line lacks a field, or a layer's number of experts changes.
    """
    layers: dict[int, LayerLoad] = {}
    for line, entry in enumerate(entries, start=1):
        layer, tokens = counts(entry, f"{path} line {line}")
        load = layers.setdefault(layer, LayerLoad())
        if load.counts and len(next(iter(load.counts.values()))) != len(tokens):
            raise UserError(f"{path} line {line}: layer {layer} has another number of experts than before")
        load.counts[entry["step"]] = tokens
        load.dropped[entry["step"]] = number(entry.get("dropped") or 0, "dropped", f"{path} line {line}")
    return dict(sorted(layers.items()))


def draw(metrics: list[Row], layers: dict[int, LayerLoad], title: str, unigram_entropy: float | None) -> "Figure":
    """The whole picture."""
    from matplotlib.figure import Figure

    columns = min(3, len(layers)) or 1
    rows = math.ceil(len(layers) / columns)
    heights = [3.8, 2.1 * rows + 0.5] if layers else [4.2]
    figure = Figure(figsize=(11, sum(heights) + 0.4), layout="constrained", dpi=130)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_loss(parts[0].subplots(), metrics, unigram_entropy)
    if layers:
        _draw_loads(parts[1], layers, rows, columns)
    return figure


def _draw_loss(axes: "Axes", metrics: list[Row], unigram_entropy: float | None) -> None:
    steps, losses = series(metrics, "lm_loss")
    with_trend = len(steps) >= _TREND_FROM_POINTS
    axes.plot(steps, losses, color=_TRAIN if with_trend else _TREND, linewidth=1.2, label="training")
    if with_trend:
        axes.plot(
            steps,
            _running_mean(losses, len(losses) // 25),
            color=_TREND,
            linewidth=2,
            label="training, smoothed",
        )
    eval_steps, eval_losses = series(metrics, "eval_lm_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_losses, "o-", color=_EVAL, markersize=5, linewidth=1.2, label="held-out")
        axes.annotate(
            f"{eval_losses[-1]:.2f}",
            (eval_steps[-1], eval_losses[-1]),
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
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.margins(x=0.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")


def _running_mean(values: list[float], radius: int) -> npt.NDArray[np.float64]:
    """[N] mean of up to `radius` neighbours on both sides.

    At the start it takes as many after a point as before it, since the loss falls steeply there; at the end
    it takes what there is, so that the last point is no noisier than the others. Losses that are not finite, of
    steps that were skipped, do not count.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    known = np.concatenate([[0], np.cumsum(finite)])
    position = np.arange(len(values))
    before = np.minimum(position, max(1, radius))
    after = np.minimum(before, len(values) - 1 - position)
    within = known[position + after + 1] - known[position - before]
    total = sums[position + after + 1] - sums[position - before]
    return np.divide(total, within, out=np.full(len(values), np.nan), where=within > 0)


def _draw_loads(part: "SubFigure", layers: dict[int, LayerLoad], rows: int, columns: int) -> None:
    part.suptitle("Expert load: tokens of an expert over an even share", fontsize=11)
    grid = part.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for position, (layer, load) in enumerate(layers.items()):
        axes = grid.flat[position]
        mesh = _draw_layer(axes, layer, load)
        if position % columns == 0:
            axes.set_ylabel("expert")
        if position + columns >= len(layers):
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
    bar = part.colorbar(mesh, ax=grid, ticks=[0, 0.5, 1, 1.5, 2], pad=0.015, aspect=22)
    bar.ax.set_yticklabels(["0", "0.5", "1 even", "1.5", "2 or more"])
    bar.outline.set_visible(False)


def _draw_layer(axes: "Axes", layer: int, load: LayerLoad) -> "QuadMesh":
    from matplotlib.colors import TwoSlopeNorm

    steps, shares = load.shares()
    experts = shares.shape[0]
    # A column reaches halfway to its neighbours, as steps need not be evenly apart.
    middles = (steps[1:] + steps[:-1]) / 2
    first = steps[0] - (middles[0] - steps[0] if len(steps) > 1 else 0.5)
    last = steps[-1] + (steps[-1] - middles[-1] if len(steps) > 1 else 0.5)
    edges = np.concatenate([[first], middles, [last]])
    mesh = axes.pcolormesh(
        edges,
        np.arange(experts + 1) - 0.5,
        shares,
        cmap="RdBu_r",
        norm=TwoSlopeNorm(1.0, 0.0, 2.0),
        rasterized=True,
    )
    dropped = sum(load.dropped.values())
    axes.set_title(f"layer {layer}: {experts} experts" + (f", {dropped:,.0f} dropped" if dropped else ""), fontsize=10)
    axes.set_yticks(range(0, experts, math.ceil(experts / _MAX_EXPERT_LABELS)))
    axes.invert_yaxis()
    return mesh


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, read the run and write the picture."""
    parser = ToolParser(__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a run's directory")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG", help="the picture to write")
    parser.add_argument(
        "--unigram-entropy",
        type=float,
        metavar="NATS",
        help="draw a line at the loss of guessing by frequency alone",
    )
    args = parser.parse_tool_args(argv)
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("plot_run needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    metrics = read_rows(args.run / "metrics.jsonl")
    if not series(metrics, "lm_loss")[0]:
        raise UserError(f"{args.run / 'metrics.jsonl'}: no line has an lm_loss; has the run made a step yet?")
    loads_path = args.run / "expert_load.jsonl"
    layers = loads_by_layer(read_rows(loads_path), loads_path) if loads_path.exists() else {}
    figure = draw(metrics, layers, args.run.resolve().name, args.unigram_entropy)
    with atomic_file(args.output, f"--output {args.output}") as stream:
        figure.savefig(stream, format="png")
    print(f"{args.output}: {len(series(metrics, 'lm_loss')[0])} steps, {len(layers)} MoE layers")


if __name__ == "__main__":
    run_tool(main)
