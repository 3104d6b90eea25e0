"""White space, punctuation, paragraphs, the last sentence."""

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import ConfigError
from megatron_moe.data.wudao.rules.paragraphs import ShortParagraphs
from megatron_moe.data.wudao.rules.punctuation import Punctuation
from megatron_moe.data.wudao.rules.sentences import LastSentence
from megatron_moe.data.wudao.rules.whitespace import SpelledOut, Whitespace


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("　　第一段。 \n\n \n\n　　第二段。\t", "第一段。\n\n第二段。"),
        ("你好 ， 世界 。下一句", "你好，世界。下一句"),
        ("第一章　　总则", "第一章　总则"),
        ("    中文缩进", "中文缩进"),
        ("中文  abc   中文", "中文 abc 中文"),
        ("（ 1 ）1、 内容", "（1）1、内容"),
        ("\n\n  \n正文\n\n", "正文"),
    ],
)
def test_space_without_meaning_goes(dirty: str, clean: str) -> None:
    assert Whitespace().clean(dirty) == clean


@pytest.mark.parametrize(
    "text",
    [
        "第一章　总则",
        "    code\n        more",
        "张三 李四",
        "a  b",
        "def f():\n    # 注释\n    return",
        "hello , world",
        "表\t格",
        "一\n\n二",
        "“ 你 ”",
    ],
)
def test_space_with_a_meaning_stays(text: str) -> None:
    assert Whitespace().clean(text) == text


@given(st.text("甲a，。（）“ 　\t\n", max_size=12), st.text("甲a，。（）“ 　\t\n", max_size=12))
@settings(max_examples=1000)
def test_a_long_text_is_tidied_as_a_short_one(begin: str, end: str) -> None:
    """A long text is looked at first, and only searched for what may be in it."""
    short = Whitespace().clean(f"{begin}乙{end}")
    assert Whitespace().clean(f"{begin}{'乙' * 300}{end}") == short.replace("乙", "乙" * 300)
    for pattern in (" \n", "\u3000\n", "\n\u3000", "\n\n\n", " ，", "， ", "甲  ", "  甲"):
        assert pattern not in short


@given(st.text("甲乙a ，　 \n", max_size=30))
@settings(max_examples=500)
def test_spelled_out_words_by_definition(text: str) -> None:
    def joined(match: re.Match[str]) -> str:
        return "".join(character for character in match.group() if character in "甲乙")

    # Characters beside Han or full-width punctuation are not written apart.
    assert SpelledOut(least=3).clean(text) == re.sub("(?<![甲乙，])[甲乙](?:[ 　]+[甲乙]){2,}(?![甲乙])", joined, text)


def test_spelled_out_words_are_joined() -> None:
    assert SpelledOut().clean("通 知 如 下 文 件") == "通知如下文件"
    assert SpelledOut().clean("通　知  如 下 文 件：\n正文") == "通知如下文件：\n正文"
    for text in ("金 木 水 火 土", "张三 李四 王五 赵六 钱七 孙八 周九", "我 是 a b c d e"):
        assert SpelledOut().clean(text) == text


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("你好，，世界、、", "你好，世界、"),
        ("完。。", "完。"),
        ("好。。。", "好……"),
        ("好...", "好……"),
        ("……………", "……"),
        ("！！！！！？？？？", "！！！？？？"),
        ("————", "——"),
    ],
)
def test_repeated_marks_are_shortened(dirty: str, clean: str) -> None:
    assert Punctuation().clean(dirty) == clean


@pytest.mark.parametrize(
    "text",
    [
        "……",
        "——",
        "！！！",
        "？！",
        "a...b",
        "1.0...",
        "C::D",
        "1,000",
        "你好,世界!",
        "；：、“”‘’「」『』【】《》〈〉·〇",
        "--verbose",
        "====",
        "...",
    ],
)
def test_other_marks_stay(text: str) -> None:
    assert Punctuation().clean(text) == text


def test_ascii_marks_become_chinese_on_request() -> None:
    rule = Punctuation(chinese=True)
    assert rule.clean("你好, 世界 !真的?好.") == "你好，世界！真的？好。"
    for text in ("a,b", "3:2", "第3.5节", "中文,English", "f(x), g(x)"):
        assert rule.clean(text) == text


LONG = "这是一个足够长的段落，有十个以上的汉字"


def test_short_paragraphs_go_and_what_has_a_form_stays() -> None:
    kept = [
        "标题",
        LONG,
        "“好。”",
        "第三条 总则",
        "一、",
        "（二）范围",
        "3.1 方法",
        "床前明月光，",
        "a whole paragraph of English",
        "    indented();",
    ]
    dropped = ["首页", "上一篇 下一篇", "分享到", "Share", "---", "}"]
    lines = [*kept[:2], *dropped, *kept[2:]]
    assert ShortParagraphs().clean("\n".join(lines)) == "\n".join(kept)


def test_short_paragraphs_to_the_letter() -> None:
    rule = ShortParagraphs(sentences=False, headings=False, first=False, foreign=0)
    assert rule.clean(f"标题\n第三条\n{LONG}\n\n“好。”\n\n{LONG}\nEnglish words only here") == f"{LONG}\n\n{LONG}"
    assert rule.clean("九个汉字的一行没有\n十个汉字的一行是有的") == "十个汉字的一行是有的"
    assert ShortParagraphs(least_han=0).clean("短\n") == "短\n"


def _naive(text: str) -> str:
    """The default options of `short_paragraphs`, line by line."""
    kept = []
    for number, line in enumerate(text.split("\n")):
        han = sum(unicodedata.name(character, "").startswith("CJK UNIFIED") for character in line)
        sentence = line[-1:] in set("。！？!?…．.；;：:，,、”’」』）)》〉】\"'］]") and han > 0
        heading = re.match("第三条|一、", line) is not None
        code = line.startswith((" ", "\t")) or (han == 0 and len(line.replace(" ", "")) >= 20)
        if not line or number == 0 or han >= 10 or sentence or heading or code:
            kept.append(line)
    return "\n".join(kept)


_LINES = [
    "",
    "短",
    "好。",
    "...",
    "。",
    "第三条",
    "一、",
    "  a",
    "\tb",
    "abc",
    "十个汉字的一行是有的呀",
    "an English line of words",
    "“好”",
    "x。好",
]


@given(st.lists(st.sampled_from(_LINES), min_size=1, max_size=7).map("\n".join))
@settings(max_examples=500)
def test_short_paragraphs_line_by_line(text: str) -> None:
    expected = _naive(text)
    if expected != text:
        expected = re.sub("\n{3,}", "\n\n", expected).strip("\n")
    assert ShortParagraphs().clean(text) == expected


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("第一句很完整也很长很长很长很长。第二句没", "第一句很完整也很长很长很长很长。"),
        ("他说：“第一句很完整也很长。”然后", "他说：“第一句很完整也很长。”"),
        ("This is a whole sentence. And th", "This is a whole sentence."),
    ],
)
def test_half_a_sentence_is_cut_off(dirty: str, clean: str) -> None:
    assert LastSentence().clean(dirty) == clean


@pytest.mark.parametrize(
    "text",
    [
        "没有标点的一行",
        "他说：“好。”",
        "完。\n（记者张三）",
        "全文完！！",
        "版本是1.5",
        "短。后面是很长的一个列表项目甲乙丙丁",
        "",
    ],
)
def test_whole_texts_stay(text: str) -> None:
    assert LastSentence().clean(text) == text


def test_options_are_checked() -> None:
    for make in (
        lambda: Punctuation(longest=0),
        lambda: SpelledOut(least=2),
        lambda: LastSentence(most=1.5),
        lambda: ShortParagraphs(least_han=-1),
    ):
        with pytest.raises(ConfigError, match="must be"):
            make()
