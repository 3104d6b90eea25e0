"""One self-contained HTML page from numbers and texts: tables, bar charts and samples, without scripts or downloads.

Every text is escaped, charts are inline SVG, and colours follow the reader's light or dark setting. The cleaning
and tokenizer tools write their `report.html` with it.
"""

import math
from collections.abc import Sequence
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
svg .first { fill: var(--bar); } svg .second { fill: var(--second); }
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
_LONGEST_LABEL = 26
_MOST_CODE_POINTS = 8

# A browser drops control characters or draws boxes: their pictures (U+2400 and on) say what stands there.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: 0x2421}

Cell = str | int | float


def escape(text: str) -> str:
    """Text as it must stand in the page: markup escaped, control characters as their pictures."""
    return escape_markup(text.translate(_PICTURES))


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
    if isinstance(value, int) or (value == int(value) and abs(value) >= 1000):
        return f"{int(value):,}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:,.4g}"


def _text(x: float, y: float, text: str, anchor: str, title: str = "") -> str:
    hover = f"<title>{escape(title)}</title>" if title else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}{hover}</text>'


def _shorten(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"
