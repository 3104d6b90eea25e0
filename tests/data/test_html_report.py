"""The page is well-formed, escapes what it shows, needs nothing from outside, and its bars have the right lengths."""

import re
from html.parser import HTMLParser

import pytest

from megatron_moe.data.html_report import Line, Page

NASTY = "<script>alert(1)</script> & \"quoted\" '一' \x00 \ufffe"


class Balance(HTMLParser):
    """Every opened element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag


def full_page() -> str:
    page = Page(NASTY, NASTY).section(NASTY, NASTY).table([NASTY, "n"], [[NASTY, 1234567], ["x", 0.123456]])
    page.bars(NASTY, [NASTY, "b"], [1, 2.5], NASTY, second=[2, 0], names=("before", "after"))
    return page.before_after(NASTY, [(NASTY, NASTY), (NASTY, None)]).texts(NASTY, [NASTY]).render()


def test_the_page_is_whole_and_escapes_everything() -> None:
    html = full_page()
    balance = Balance()
    balance.feed(html)
    assert not balance.open
    assert {"svg", "table", "details", "pre"} <= balance.seen
    assert "script" not in balance.seen
    assert not re.search(r"(src|href|url)\s*[=(]", html)
    assert "\0" not in html
    assert "␀" in html
    assert "1,234,567" in html
    assert "0.1235" in html


def test_what_differs_is_marked() -> None:
    html = Page("t").before_after("c", [("他說\uf96f話<b>", "他說說話<b>"), ("一　二", "一二")]).render()
    assert '<pre class="old">他說<mark title="U+F96F">\uf96f</mark>話&lt;b&gt;</pre>' in html
    assert '<pre class="new">他說<mark title="U+8AAA">說</mark>話&lt;b&gt;</pre>' in html
    assert '<pre class="old">一<mark title="U+3000">\u3000</mark>二</pre><pre class="new">一二</pre>' in html


def test_bars_are_in_proportion() -> None:
    html = Page("t").bars("c", ["a", "b", "c"], [4, 2, 0]).render()
    a, b, c = (float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', html))
    assert a == pytest.approx(2 * b)
    assert a > 100
    assert c == 0


def test_labels_and_values_must_fit() -> None:
    with pytest.raises(ValueError, match="2 labels"):
        Page("t").bars("c", ["a", "b"], [1])


def test_a_chart_without_values_is_drawn() -> None:
    assert "<svg" in Page("t").bars("c", [], []).render()


def test_lines_go_where_their_points_are() -> None:
    """Round numbers enclose the values, and gaps part a line in two."""
    nan = float("nan")
    values = [1.0, 3.0, nan, 2.0, 2.5]
    html = Page("t").lines(NASTY, [Line(NASTY, range(5), values), Line("b", [2.0], [1.5])], "step").render()
    strokes = re.findall(r'<polyline[^>]* points="([^"]+)"', html)
    points = [[tuple(map(float, point.split(","))) for point in stroke.split()] for stroke in strokes]
    assert [len(stroke) for stroke in points] == [2, 2]
    (first, second), (third, fourth) = points
    assert second[0] - first[0] == pytest.approx(fourth[0] - third[0], abs=0.2)
    # Upwards is less; from 1 to 3 is four times as far as from 2 to 2.5.
    assert first[1] - second[1] == pytest.approx(4 * (third[1] - fourth[1]), abs=0.5)
    assert len(re.findall("<circle", html)) == 1
    for tick in ("1", "1.5", "2", "2.5", "3", "4"):
        assert f">{tick}</text>" in html
    assert "<script" not in html


@pytest.mark.parametrize("values", [[], [float("nan")], [0.0], [5.0, 5.0], [1e-320, 2e-320], [-1e30, 1e30], [1e-8] * 2])
def test_lines_of_odd_values(values: list[float]) -> None:
    html = Page("t").lines("c", [Line("a", range(len(values)), values)], "step", from_zero=True).render()
    assert ("<svg" in html) == any(value == value for value in values)
    assert "nan" not in html
    assert "inf" not in html.replace("infinity", "")
