"""Tags, references, scripts."""

import time

import pytest

from megatron_moe.data.wudao.rules.markup import Html, Scripts


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("<p>第一段</p><p>第二段<br/>换行</p>", "\n第一段\n\n第二段\n换行\n"),
        ("a&nbsp;b&lt;c&amp;d&#20013;&#x6587;&ldquo;", "a b<c&d中文“"),
        ("<script>var a='</p>';if(a<b){}</script>正文<style>p{}</style>", "\n正文\n"),
        ("<a href=\"x>y\" title='<b>'>链接</a>", "链接"),
        ("<!-- 注释 -- > --><!DOCTYPE html>后", "后"),
        ("&amp;nbsp;&amp;lt;br&amp;gt;", " \n"),
        ("<FONT color=red>红</FONT><o:p></o:p>", "红"),
        ("<b>粗</b>和<i>斜</i>", "粗和斜"),
        ("&#0;&#xD800;", ""),
    ],
)
def test_residue_goes(dirty: str, clean: str) -> None:
    assert Html().clean(dirty) == clean


@pytest.mark.parametrize(
    "text",
    [
        "x<y && y>z",
        "List<String> 和 vector<int>",
        "《<三国>》",
        "a<b>c",
        "泛型<T>",
        "用<p>标签、<br>元素",
        "AT&T、R&D、?a=1&lt=2&copy 2008",
        "<div class=没有结束",
        "1 < 2 > 0",
        "<3 你",
        "<http>",
        "&不是实体;",
    ],
)
def test_text_that_only_looks_like_markup_stays(text: str) -> None:
    assert Html().clean(text) == text


@pytest.mark.parametrize(
    "text", ["<a " * 20000, "<script>" * 20000, "<!--" * 20000, '<a "' * 20000, "&#" * 40000, "<a ='" * 9999]
)
def test_hostile_markup_takes_no_longer_than_its_length(text: str) -> None:
    half, whole = text[: len(text) // 2], text
    Html().clean(half)
    times = []
    for size in (half, whole):
        start = time.process_time()
        Html().clean(size)
        times.append(time.process_time() - start)
    # Quadratic work on these takes 5 s and more, and what is proportional a few milliseconds.
    assert times[1] < 1.0 or times[1] < 3 * times[0]


def test_script_lines_go() -> None:
    scripts = "var _hmt = _hmt || [];\n\u3000document.write('x');\n$(document).ready(f)\nbody { color: red; }"
    dirty = f"正文一。\n{scripts}\n正文二。"
    assert Scripts().clean(dirty) == "正文一。\n正文二。"


@pytest.mark.parametrize(
    "text",
    [
        "window.location是对象",
        "在JS里 var x = 1; 表示变量",
        "f(x) = {a: 1}",
        "C = { 1, 2 }",
        "a = b(c)",
        "var a = 1;",
        "function f(){",
    ],
)
def test_other_lines_stay(text: str) -> None:
    assert Scripts().clean(text) == text
