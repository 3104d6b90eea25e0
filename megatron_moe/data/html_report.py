"""One self-contained HTML page from numbers and texts: tables, charts and samples, without downloads.

Every text is escaped, charts are inline SVG, and colours follow the reader's light or dark setting. The cleaning
and tokenizer tools write their `report.html` with it, and `tools/plot_run.py` the page of a run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape as escape_markup
from typing import Self

_STYLE = """
:root { --ink: #1c1e21; --paper: #ffffff; --soft: #f1f3f5; --line: #d5d9de; --bar: #3b6fb5; --second: #d98032;
        --old: #b3372f; --new: #237a3f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e6e9; --paper: #16181b; --soft: #22262a; --line: #3a4047; --bar: #6f9fe0; --second: #e6a063;
          --old: #ec8079; --new: #7fcb96; } }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; color: var(--ink);
       background: var(--paper); max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: .8rem 0; } th, td { padding: .25rem .7rem; border: 1px solid var(--line);
       text-align: left; vertical-align: top; } th { background: var(--soft); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; } figure { margin: 1rem 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font-size: 12px; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .line { fill: none; stroke-width: 1.8; }
svg .first { fill: var(--bar); } svg .second { fill: var(--second); }
.swatch { display: inline-block; width: 1.1em; height: .9em; margin: 0 .35em 0 1.1em; border: 1px solid var(--line);
       vertical-align: -1px; }
input[type=range] { width: min(36rem, 75%); vertical-align: middle; }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { background: var(--soft); padding: .5rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0;
      border-left: 4px solid var(--line); }
pre.old { border-left-color: var(--old); } pre.new { border-left-color: var(--new); }
mark { background: none; color: inherit; border-bottom: 2px solid var(--line); font-weight: 700; }
pre.old mark { border-color: var(--old); } pre.new mark { border-color: var(--new); }
""".strip()
_WIDTH, _LABEL, _VALUE = 900, 220, 130
# Height of a bar with the room around it: one a label, or two.
_ROW, _PAIR_ROW = 20, 14
_CHART_HEIGHT = 300
# What is smaller is drawn as zero.
_SMALLEST = 1e-100
_LONGEST_LABEL = 26
_MOST_CODE_POINTS = 8

# A browser drops control characters or draws boxes: their pictures (U+2400 and on) say what stands there.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}

Cell = str | int | float


def escape(text: str) -> str:
    """Text as it must stand in the page: markup escaped, control characters as their pictures."""
    return escape_markup(text.translate(_PICTURES))


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    """NaN leaves a gap."""
    color: str = "var(--bar)"
    """As CSS names it."""
    faint: bool = False
    dots: bool = False
    dashed: bool = False


class Page:
    """A page that grows from top to bottom; every method returns the page, `render` its HTML.

    Args:
        title: the heading, and the title in the browser's tab.
        introduction: a sentence below it.
    """

    def __init__(self, title: str, introduction: str = "") -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        if introduction:
            self._parts.append(f"<p>{escape(introduction)}</p>")

    def section(self, heading: str, text: str = "") -> Self:
        """A heading, and a paragraph below it."""
        self._parts.append(f"<h2>{escape(heading)}</h2>")
        return self.paragraph(text) if text else self

    def paragraph(self, text: str) -> Self:
        """A paragraph of plain text."""
        self._parts.append(f"<p>{escape(text)}</p>")
        return self

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Self:
        """A table; numbers are grouped by thousands and stand to the right."""
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        self._parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )
        return self

    def bars(
        self,
        caption: str,
        labels: Sequence[str],
        values: Sequence[float],
        unit: str = "",
        second: Sequence[float] | None = None,
        names: tuple[str, str] = ("", ""),
    ) -> Self:
        """A chart of horizontal bars from zero.

        Args:
            caption: what is shown.
            labels, values: one bar each; values are not negative.
            unit: stands behind every value.
            second: one more bar a label, such as the state after beside the one before.
            names: what the first and the second bars are.
        """
        series = [values] if second is None else [values, second]
        if any(len(one) != len(labels) for one in series):
            raise ValueError(f"{len(labels)} labels for {[len(one) for one in series]} values")
        largest = max((value for one in series for value in one), default=0) or 1
        bar = _ROW if second is None else _PAIR_ROW
        height = bar * len(series)
        lines = []
        for row, label in enumerate(labels):
            top = row * (height + 6)
            lines.append(_text(_LABEL - 8, top + height / 2 + 4, _shorten(label), "end", title=label))
            for place, one in enumerate(series):
                y = top + place * bar
                width = (_WIDTH - _LABEL - _VALUE) * one[row] / largest
                kind = ("first", "second")[place]
                lines.append(
                    f'<rect class="{kind}" x="{_LABEL}" y="{y + 1}" width="{width:.1f}" height="{bar - 2}" rx="2"/>'
                )
                shown = f"{_number(one[row])} {unit}".strip()
                lines.append(_text(_LABEL + width + 6, y + bar / 2 + 4, shown, "start"))
        full = max(1, len(labels)) * (height + 6)
        legend = f" ({names[0]} above, {names[1]} below)" if second is not None and any(names) else ""
        self._parts.append(
            f"<figure><figcaption>{escape(caption + legend)}</figcaption>"
            f'<svg viewBox="0 0 {_WIDTH} {full}" role="img" aria-label="{escape(caption)}">'
            f"{''.join(lines)}</svg></figure>"
        )
        return self

    def lines(self, caption: str, lines: Sequence[Line], x_name: str, *, from_zero: bool = False) -> Self:
        """A chart of lines over one axis; nothing where no point is finite.

        Args:
            caption: what is shown.
            lines: drawn in this order; their names make the legend.
            x_name: what the axis below counts.
            from_zero: let the upright axis begin at 0.
        """
        drawn = line_chart(caption, lines, x_name, from_zero)
        return self.markup(f"<figure><figcaption>{escape(caption)}</figcaption>{drawn}</figure>") if drawn else self

    def markup(self, markup: str) -> Self:
        """HTML that the caller has made, with every text in it escaped."""
        self._parts.append(markup)
        return self

    def before_after(self, heading: str, samples: Sequence[tuple[str, str | None]]) -> Self:
        """Texts before and after a change, folded; None after stands for a dropped document.

        What differs is marked, and its code points show under the pointer: many characters look alike.
        """
        pairs = "".join(
            f'<pre class="old">{escape(before)}</pre><p>dropped</p>' if after is None else _marked(before, after)
            for before, after in samples
        )
        self._parts.append(f"<details><summary>{escape(heading)}: {len(samples)} samples</summary>{pairs}</details>")
        return self

    def texts(self, heading: str, samples: Sequence[str]) -> Self:
        """Texts as they are, folded."""
        shown = "".join(f"<pre>{escape(text)}</pre>" for text in samples)
        self._parts.append(f"<details><summary>{escape(heading)}</summary>{shown}</details>")
        return self

    def render(self) -> str:
        """The whole page."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head><body>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )


def line_chart(caption: str, lines: Sequence[Line], x_name: str, from_zero: bool) -> str:
    """The SVG of a chart of lines, or nothing when there is no point to draw."""
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    left, right, top, bottom = 70, _WIDTH - 20, 30, _CHART_HEIGHT - 40
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    x_ticks = _ticks(x_low, x_high, most=9)
    y_ticks = _ticks(0.0 if from_zero else min(y for _, y in points), max(y for _, y in points), most=5)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return left + across * (right - left), bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    parts = []
    for tick in y_ticks:
        height = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(_text(left - 8, height + 4, _number(tick), "end"))
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            parts.append(_text(place(tick, y_low)[0], bottom + 18, _number(tick), "middle"))
    parts.append(_text(right, bottom + 34, x_name, "end"))
    parts += [_drawn(line, place) for line in lines]
    parts += _legend(lines, left)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_CHART_HEIGHT}" role="img" aria-label="{escape(caption)}">{"".join(parts)}</svg>'
    )


def _drawn(line: Line, place: Callable[[float, float], tuple[float, float]]) -> str:
    """A line's strokes, one for each stretch without gaps, or its dots."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if math.isfinite(y):
            stretches[-1].append(place(x, y))
        elif stretches[-1]:
            stretches.append([])
    color = escape(line.color)
    style = ' stroke-dasharray="6 5"' if line.dashed else ""
    style += ' stroke-opacity="0.4"' if line.faint else ""
    marks = []
    for stretch in stretches:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in stretch)
        if len(stretch) > 1:
            marks.append(f'<polyline class="line" stroke="{color}" points="{path}"{style}/>')
        if line.dots or len(stretch) == 1:
            marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in stretch]
    return "".join(marks)


def _legend(lines: Sequence[Line], left: int) -> list[str]:
    named = [line for line in lines if line.name]
    parts, x = [], float(left)
    for line in named:
        opacity = ' opacity="0.4"' if line.faint else ""
        parts.append(f'<rect x="{x:.0f}" y="7" width="14" height="4" fill="{escape(line.color)}"{opacity}/>')
        parts.append(_text(x + 19, 13, line.name, "start"))
        x += 36 + 7 * len(line.name)
    return parts


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers that enclose both, about `most` of them or fewer."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or size < _SMALLEST:
        half = size / 10 if size >= _SMALLEST else 0.5
        low, high = low - half, high + half
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [number * step for number in range(first, last + 1)]


def _marked(before: str, after: str) -> str:
    """Two texts one below the other, with marks where they differ."""
    old: list[str] = []
    new: list[str] = []
    for kind, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        for parts, text in ((old, before[i:j]), (new, after[k:m])):
            parts.append(escape(text) if kind == "equal" or not text else _mark(text))
    return f'<pre class="old">{"".join(old)}</pre><pre class="new">{"".join(new)}</pre>'


def _mark(text: str) -> str:
    shown = " ".join(f"U+{ord(character):04X}" for character in text[:_MOST_CODE_POINTS])
    more = " …" if len(text) > _MOST_CODE_POINTS else ""
    return f'<mark title="{shown}{more}">{escape(text)}</mark>'


def _cell(value: Cell) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    return f'<td class="number">{_number(value)}</td>'


def _number(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"


def _text(x: float, y: float, text: str, anchor: str, title: str = "") -> str:
    hover = f"<title>{escape(title)}</title>" if title else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}{hover}</text>'


def _shorten(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"
