"""Layers x experts of one moment as inline SVG, and what a small script needs to move it through time.

A row is a layer, a cell an expert; layers of fewer experts have fewer cells. White is an even share, blue less, red
more. Without JavaScript the last moment stays.
"""

import json
from html import escape
from importlib.resources import files
from typing import Any

from megatron_moe.training.run_report.history import Frame, LoadHistory

_WIDTH, _LABEL, _TOP = 900, 70, 4
_WIDEST_CELL, _ROW, _GAP = 34, 20, 3
# Blue, white and red of the picture's colour map (ColorBrewer's RdBu), at none, an even and a double share.
COLORS = ((33, 102, 172), (247, 247, 247), (178, 24, 43))
# Numbers that the page may hold: beyond it there are fewer moments.
_MOST_NUMBERS = 600_000
_FEWEST_FRAMES = 20


def color_of(share: float) -> str:
    """The colour of a share over an even one; the script has the same rule."""
    share = min(2.0, max(0.0, share))
    low, high = (COLORS[0], COLORS[1]) if share <= 1 else (COLORS[1], COLORS[2])
    part = share if share <= 1 else share - 1
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def heat_map(loads: LoadHistory) -> str:
    """The map with its slider, as HTML; leaves no more moments in `loads` than the page has room for."""
    room = _MOST_NUMBERS // max(1, sum(loads.experts.values()))
    loads.thin(min(len(loads.frames), max(_FEWEST_FRAMES, room)) or 1)
    data = json.dumps(_data(loads), separators=(",", ":")).replace("<", "\\u003c")
    script = files("megatron_moe.training.run_report").joinpath("heat_map.js").read_text(encoding="utf-8")
    return (
        '<figure id="loads"><figcaption>Tokens of an expert over an even share: '
        f'<span id="loads-when">{escape(loads.frames[-1].label)}</span></figcaption>'
        f'<div id="loads-controls" hidden><button type="button" id="loads-play">play</button> '
        f'<input type="range" id="loads-slider" min="0" max="{len(loads.frames) - 1}" '
        f'value="{len(loads.frames) - 1}" step="1" aria-label="moment"></div>'
        f"{_svg(loads, loads.frames[-1])}"
        f'<div id="loads-readout">{_scale()}</div></figure>'
        f'<script type="application/json" id="loads-data">{data}</script><script>{script}</script>'
    )


def _data(loads: LoadHistory) -> dict[str, Any]:
    """For every moment and layer the shares in percent of an even one; null where a layer was not logged."""
    frames = []
    for frame in loads.frames:
        rows = [frame.layers.get(layer) for layer in loads.experts]
        frames.append([None if row is None else (row.shares * 100).round().astype(int).tolist() for row in rows])
    return {
        "labels": [frame.label for frame in loads.frames],
        "layers": list(loads.experts),
        "colors": COLORS,
        "frames": frames,
    }


def _svg(loads: LoadHistory, frame: Frame) -> str:
    widest = max(loads.experts.values())
    cell = min(_WIDEST_CELL, (_WIDTH - _LABEL) / widest)
    parts = []
    for row, (layer, experts) in enumerate(loads.experts.items()):
        top = _TOP + row * (_ROW + _GAP)
        parts.append(f'<text x="{_LABEL - 8}" y="{top + 15}" text-anchor="end">layer {layer}</text>')
        load = frame.layers.get(layer)
        shares = [None] * experts if load is None else load.shares.tolist()
        for expert, share in enumerate(shares):
            fill, read = ("none", "not logged") if share is None else (color_of(share), f"{share:.2f}")
            parts.append(
                f'<rect class="cell" x="{_LABEL + expert * cell:.1f}" y="{top}" width="{max(1.0, cell - 1):.1f}" '
                f'height="{_ROW}" fill="{fill}"><title>layer {layer}, expert {expert}: {read}</title></rect>'
            )
    height = _TOP + len(loads.experts) * (_ROW + _GAP)
    label = f"tokens of every expert, {frame.label}"
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _scale() -> str:
    """What the colours mean."""
    names = ((0.0, "none"), (0.5, "half"), (1.0, "even"), (1.5, "1.5 times"), (2.0, "twice or more"))
    return "".join(f'<span class="swatch" style="background:{color_of(share)}"></span>{name} ' for share, name in names)
