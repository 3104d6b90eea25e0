"""The page's script under Node with a document of its own: the slider gives every cell the colour that Python would."""

import json
import re
import shutil
import subprocess

import pytest

from megatron_moe.training.run_report.heat_map import color_of, heat_map
from megatron_moe.training.run_report.history import LoadHistory

NODE = shutil.which("node")
# As much of a document as the script asks for.
DOCUMENT = """
const made = (extra) => ({listeners: {}, addEventListener(kind, f) { this.listeners[kind] = f; }, ...extra});
const cells = Array.from({length: CELLS}, () => made({firstChild: {}, setAttribute(_, fill) { this.fill = fill; }}));
const elements = {
  "loads-data": made({textContent: DATA}), "loads-when": made({}), "loads-controls": made({hidden: true}),
  "loads-slider": made({value: "2", max: "2"}), "loads-play": made({}),
};
const document = {getElementById: (id) => elements[id], querySelectorAll: () => cells};
"""
MOVE = """
elements["loads-slider"].value = "1";
elements["loads-slider"].listeners.input();
console.log(JSON.stringify({
  when: elements["loads-when"].textContent, hidden: elements["loads-controls"].hidden,
  fills: cells.map((cell) => cell.fill), titles: cells.map((cell) => cell.firstChild.textContent),
}));
"""


def channels(color: str) -> list[int]:
    """Red, green and blue of `rgb(1,2,3)` or `#010203`."""
    if color.startswith("#"):
        return [int(color[place : place + 2], 16) for place in (1, 3, 5)]
    return [int(part) for part in re.findall(r"\d+", color)]


@pytest.mark.skipif(NODE is None, reason="needs Node.js")
def test_the_slider_moves_the_map() -> None:
    loads = LoadHistory()
    for step in (10, 20, 30):
        for layer, experts in ((2, 2), (4, 5)):
            if (step, layer) != (20, 2):
                tokens = [(step * expert) % 7 for expert in range(1, experts + 1)]
                loads.add({"step": step, "layer": layer, "tokens": tokens}, "here")
    page = heat_map(loads.finish())
    data, script = re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL)
    document = DOCUMENT.replace("CELLS", "7").replace("DATA", json.dumps(data))
    assert NODE
    result = subprocess.run([NODE, "-e", document + script + MOVE], capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    shares = [round(share * 100) / 100 for share in loads.frames[1].layers[4].shares]
    assert found["when"] == "step 20"
    assert found["hidden"] is False
    assert found["fills"][:2] == ["none"] * 2
    for fill, share in zip(found["fills"][2:], shares, strict=True):
        # JavaScript rounds halves up, Python to even.
        assert channels(fill) == pytest.approx(channels(color_of(share)), abs=1)
    assert found["titles"][0] == "layer 2, expert 0: not logged"
    assert found["titles"][2:] == [f"layer 4, expert {expert}: {share:.2f}" for expert, share in enumerate(shares)]
