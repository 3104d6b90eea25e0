"""Reads a run's metrics.jsonl and expert_load.jsonl in a bounded amount of memory, however long the run.

Metrics are kept whole: a few numbers a step. Loads are summed up: every frame holds one logged step at first, and
whenever there are too many frames each two neighbours become one.

Shape legend: N = points, E = experts of a layer.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_moe.config.base import UserError
from megatron_moe.data.rows import Row, amount, counts, iterate_rows, number
from megatron_moe.moe.load import entropy, variation

METRICS = ("lm_loss", "eval_lm_loss", "tokens_per_second", "lr", "expert_lr")
MOST_FRAMES = 200
# A loss beyond it is as good as none: no scale shows it.
_LARGEST = 1e30

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """A number over the steps, in order; NaN where it was not finite."""

    steps: Floats
    """[N]."""
    values: Floats
    """[N]."""

    def __len__(self) -> int:
        return len(self.steps)

    def thinned(self, most: int) -> "Series":
        """At most `most` points: means of as many steps each, of what is finite."""
        if len(self) <= most:
            return self
        edges = np.linspace(0, len(self), most + 1).astype(np.int64)[:-1]
        finite = np.isfinite(self.values)
        known = np.add.reduceat(finite.astype(np.float64), edges)
        sums = np.add.reduceat(np.where(finite, self.values, 0.0), edges)
        sizes = np.diff(np.append(edges, len(self)))
        means = np.divide(sums, known, out=np.full(most, np.nan), where=known > 0)
        return Series(np.add.reduceat(self.steps, edges) / sizes, means)

    def smoothed(self, radius: int) -> "Series":
        """Means of up to `radius` neighbours on both sides.

        At the start it takes as many after a point as before it, since a loss falls steeply there; at the end it takes
        what there is, so that the last point is no noisier than the others.
        """
        finite = np.isfinite(self.values)
        sums = np.concatenate([[0.0], np.cumsum(np.where(finite, self.values, 0.0))])
        known = np.concatenate([[0], np.cumsum(finite)])
        position = np.arange(len(self))
        before = np.minimum(position, max(1, radius))
        after = np.minimum(before, len(self) - 1 - position)
        within = known[position + after + 1] - known[position - before]
        total = sums[position + after + 1] - sums[position - before]
        means = np.divide(total, within, out=np.full(len(self), np.nan), where=within > 0)
        return Series(self.steps, means)


def read_metrics(path: Path) -> dict[str, Series]:
    """Every metric of `METRICS` that the run has, by name.

    Of a step that a resumed run logged again the later line counts.

    Raises:
        UserError: a line is no row, a value no number, or no line has a loss.
    """
    found: dict[str, dict[int, float]] = {name: {} for name in METRICS}
    for line, row in iterate_rows(path):
        for name, values in found.items():
            if row.get(name) is not None:
                values[row["step"]] = number(row[name], name, f"{path} line {line}")
    if not found["lm_loss"]:
        raise UserError(f"{path}: no line has an lm_loss; has the run made a step yet?")
    return {name: _series(values) for name, values in found.items() if values}


def _series(values: dict[int, float]) -> Series:
    steps = sorted(values)
    numbers = np.array([values[step] for step in steps], dtype=np.float64)
    numbers[~(np.abs(numbers) <= _LARGEST)] = np.nan
    return Series(np.array(steps, dtype=np.float64), numbers)


@dataclass
class LayerSum:
    """One layer's load over the steps of a frame."""

    tokens: Floats
    """[E] assignments each expert processed."""
    dropped: float
    recycled: float
    variations: float
    """Sum of the steps' coefficients of variation."""
    entropies: float
    """Sum of the steps' normalised entropies."""
    steps: int = 1

    @property
    def shares(self) -> Floats:
        """[E] tokens of each expert over an even share; 1 is even, and so is a layer without tokens."""
        mean = self.tokens.mean()
        return self.tokens / mean if mean > 0 else np.ones_like(self.tokens)

    @property
    def asked(self) -> float:
        """Assignments that the router asked for; at least 1."""
        return max(1.0, float(self.tokens.sum()) + self.dropped)

    @property
    def variation(self) -> float:
        """Mean over the steps."""
        return self.variations / self.steps

    @property
    def entropy(self) -> float:
        """Mean over the steps."""
        return self.entropies / self.steps

    def add(self, other: "LayerSum") -> None:
        """Take in later steps."""
        self.tokens = self.tokens + other.tokens
        self.dropped += other.dropped
        self.recycled += other.recycled
        self.variations += other.variations
        self.entropies += other.entropies
        self.steps += other.steps


@dataclass
class Frame:
    """Loads of one logged step, or of several in a row."""

    first: int
    """Step."""
    last: int
    """Step."""
    steps: int = 1
    """How many were logged from the first to the last."""
    layers: dict[int, LayerSum] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Which steps."""
        return f"step {self.first:,}" if self.first == self.last else f"steps {self.first:,} to {self.last:,}"

    @property
    def middle(self) -> float:
        """Where it stands on an axis of steps."""
        return (self.first + self.last) / 2

    def put(self, layer: int, load: LayerSum) -> None:
        """Add one step's load of a layer."""
        if layer in self.layers:
            self.layers[layer].add(load)
        else:
            self.layers[layer] = load

    def join(self, later: "Frame") -> None:
        """Take in the next frame."""
        self.last = later.last
        self.steps += later.steps
        for layer, load in later.layers.items():
            self.put(layer, load)


class LoadHistory:
    """The loads of a run over time.

    Args:
        most: frames at the end; there are up to twice as many while it grows.

    Attributes:
        frames: in the order of the steps.
        experts: layer -> number of experts, in the order of the layers.
    """

    def __init__(self, most: int = MOST_FRAMES) -> None:
        self.frames: list[Frame] = []
        self.experts: dict[int, int] = {}
        self._most, self._width = most, 1
        self._seen: set[int] = set()

    def add(self, row: Row, where: str) -> None:
        """One line of expert_load.jsonl.

        Raises:
            UserError: it lacks a field, or its layer's number of experts changes.
        """
        layer, tokens = counts(row, where)
        if self.experts.setdefault(layer, len(tokens)) != len(tokens):
            raise UserError(f"{where}: layer {layer} has another number of experts than before")
        dropped, recycled = amount(row, "dropped", where), amount(row, "recycled", where)
        load = LayerSum(np.array(tokens), dropped, recycled, variation(tokens), entropy(tokens))
        self._frame_of(row["step"], layer).put(layer, load)

    def _frame_of(self, step: int, layer: int) -> Frame:
        if not self.frames or step > self.frames[-1].last:
            self._seen = {layer}
            if self.frames and self.frames[-1].steps < self._width:
                self.frames[-1].last = step
                self.frames[-1].steps += 1
                return self.frames[-1]
            if len(self.frames) >= 2 * self._most:
                self._halve()
                return self._frame_of(step, layer)
            self.frames.append(Frame(step, step))
        elif step < self.frames[-1].last or layer in self._seen:
            # A run that went on from an earlier step: what it logs now takes the place of what it logged before. Steps
            # that are in one frame with earlier ones cannot be taken out of it.
            while self.frames and self.frames[-1].first >= step:
                self.frames.pop()
            if not self.frames or step > self.frames[-1].last:
                self.frames.append(Frame(step, step))
            self._seen = {layer}
        else:
            self._seen.add(layer)
        return self.frames[-1]

    def _halve(self) -> None:
        for place in range(0, len(self.frames) - 1, 2):
            self.frames[place].join(self.frames[place + 1])
        self.frames = self.frames[::2]
        self._width *= 2

    def finish(self) -> "LoadHistory":
        """Call once after the last line: sorts the layers and leaves `most` frames at most."""
        while len(self.frames) > self._most:
            self._halve()
        self.experts = dict(sorted(self.experts.items()))
        return self

    def thin(self, most: int) -> "LoadHistory":
        """Leave at most that many frames."""
        self._most = most
        return self.finish()

    def over_time(self, layer: int) -> list[tuple[Frame, LayerSum]]:
        """The frames that hold a layer."""
        return [(frame, frame.layers[layer]) for frame in self.frames if layer in frame.layers]


def read_loads(path: Path, most: int = MOST_FRAMES) -> LoadHistory:
    """The loads of a run; none for a dense model, which has no such file.

    Raises:
        UserError: a line is not as it should be.
    """
    history = LoadHistory(most)
    if path.exists():
        for line, row in iterate_rows(path):
            history.add(row, f"{path} line {line}")
    return history.finish()
