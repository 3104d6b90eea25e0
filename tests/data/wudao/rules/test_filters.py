"""Rules that drop documents: length, Han, lines, repetition, words, language."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import ConfigError, UserError
from megatron_moe.data.wudao.rules import Filter
from megatron_moe.data.wudao.rules.characters import View
from megatron_moe.data.wudao.rules.language import Language
from megatron_moe.data.wudao.rules.length import HanRatio, Length, LineLength
from megatron_moe.data.wudao.rules.repetition import RepeatedLines, RepeatedNgrams
from megatron_moe.data.wudao.rules.words import Advertising, SensitiveWords, read_words
from tests.data.chinese_text import documents
from tests.data.wudao.rules.text import PROSE


def _reason(rule: Filter, text: str) -> str | None:
    return rule.reason(View(text))


def test_length() -> None:
    rule = Length(least=3, most=5)
    assert _reason(rule, "一二") == "2 characters, fewer than 3"
    assert _reason(rule, "一二三四五六") == "6 characters, more than 5"
    assert _reason(rule, "一二三") is None
    assert _reason(rule, "一二三四五") is None
    with pytest.raises(ConfigError, match=r"length\.most 2: must be at least 3, which is `least`"):
        Length(least=3, most=2)


def test_han_ratio_counts_visible_characters() -> None:
    rule = HanRatio(least=0.5)
    assert _reason(rule, "汉字ab") is None
    assert _reason(rule, "汉 字 a b") is None
    assert _reason(rule, "汉字abc") == "0.40 of the characters are Han, less than 0.5"
    assert _reason(rule, "") == "no characters"
    assert _reason(rule, " \n") == "no characters"
    assert _reason(rule, "𠮷㐂〇abc") is None


def test_line_length_leaves_blank_lines_out() -> None:
    rule = LineLength(least=4)
    assert _reason(rule, "一二三四\n\n\n五六七八") is None
    assert _reason(rule, "一二三\n四五六七") == "3.5 characters in a line, fewer than 4"
    assert _reason(rule, "") is not None


def _share(text: str, n: int) -> float:
    """EvalWeb's measure, as its words say it."""
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    counts = Counter(grams)
    return sum(count for count in counts.values() if count > 1) / len(grams) if len(grams) > 1 else 0.0


@given(
    st.lists(
        st.sampled_from(["天地玄黄宇宙洪荒", "日月盈昃", "abcdefg", "哈", "寒来暑往秋收冬藏闰余成岁"])
        | st.text("甲乙丙丁", max_size=40),
        max_size=60,
    ),
    st.sampled_from([2, 5, 13]),
    st.sampled_from([0.1, 0.5, 0.9]),
)
@settings(max_examples=300, deadline=None)
def test_repeated_ngrams_are_those_of_the_definition(pieces: list[str], n: int, most: float) -> None:
    text = "".join(pieces)
    found = RepeatedNgrams(ngram=n, most=most)
    expected = _share(text.lower(), n)
    if found.share(View(text)) != 0.0 or expected > most:
        assert found.share(View(text)) == pytest.approx(expected)
    assert (_reason(found, text) is not None) == (expected > most)


def test_repetition_sees_through_case_and_space() -> None:
    line = "Buy这个产品真的非常好用大家快来买 "
    assert _reason(RepeatedNgrams(), line + "\n" + line.upper() + line.lower()) is not None
    for text in [*PROSE.values(), *documents(50)]:
        assert _share(text, 13) <= 0.5
        assert _reason(RepeatedNgrams(), text) is None


def test_repeated_lines() -> None:
    rule = RepeatedLines()
    assert _reason(rule, "甲\n乙\n丙\n丁") is None
    assert _reason(rule, "一样的行\n一样的行\n\n不同") == "0.33 of the lines are copies, more than 0.3"
    long = "这一行非常长，" * 10
    assert _reason(rule, "\n".join([long, "甲", "乙", "丙", "丁", long])) == (
        "0.49 of the characters are in copied lines, more than 0.2"
    )
    assert _reason(rule, "\n\n\n甲\n\n乙") is None


def _list(path: Path, *words: str) -> str:
    path.write_text("\n".join(words), encoding="utf-8")
    return str(path)


def test_sensitive_words_need_density(tmp_path: Path) -> None:
    rule = SensitiveWords(file=_list(tmp_path / "list.txt", "# 说明", "赌博\t类别", "诈骗", "盗窃", "赌博机", ""))
    assert _reason(rule, PROSE["law"]) is None
    assert _reason(rule, "赌博诈骗盗窃网站") == "3 listed words in 1 lines: 盗窃、诈骗、赌博"
    assert _reason(rule, "赌博赌博赌博赌博") is None
    assert _reason(SensitiveWords(file=rule.file, share=0.9), "赌博诈骗盗窃网站") is None
    assert _reason(rule, "赌博机诈骗。\n" * 3) is None


def test_advertising_lines_go(tmp_path: Path) -> None:
    rule = Advertising(file=_list(tmp_path / "ads.txt", "加微信", "扫码", "优惠"))
    text = "正文里说到优惠两个字是可以的。\n加微信扫码领优惠\n他扫码付了钱。"
    assert rule.clean(text) == "正文里说到优惠两个字是可以的。\n他扫码付了钱。"
    assert rule.clean("没有这些词") == "没有这些词"


def test_word_lists_are_read_strictly(tmp_path: Path) -> None:
    assert read_words(_list(tmp_path / "a", "\ufeff甲", "乙\t1", "甲", "#丙")) == ("甲", "乙")
    with pytest.raises(UserError, match=r"word list .*missing: cannot be read"):
        read_words(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="has no words; give one a line"):
        read_words(_list(tmp_path / "b", "#", ""))
    (tmp_path / "c").write_bytes("甲".encode("gbk"))
    with pytest.raises(UserError, match="is not UTF-8 at byte 0"):
        read_words(str(tmp_path / "c"))


def test_words_tell_contents_not_paths(tmp_path: Path) -> None:
    one, same, other = (_list(tmp_path / name, word) for name, word in (("a", "甲"), ("b", "甲"), ("c", "乙")))
    identity = SensitiveWords(file=one).identity()
    assert identity == SensitiveWords(file=same).identity()
    assert identity != SensitiveWords(file=other).identity()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("This is a page in English with hardly any Chinese 你好 in it, only words and more words.", "en"),
        ("これは日本語の文章です。漢字も使いますが、仮名が多いです。東京に住んでいます。", "ja"),
        ("이것은 한국어 문장입니다. 한자는 거의 없습니다.", "ko"),
        ("Это русский текст без китайских иероглифов.", "ru"),
    ],
)
def test_other_languages_are_dropped(text: str, language: str) -> None:
    reason = _reason(Language(), text)
    assert reason is not None
    assert reason.startswith(f"language {language} with probability ")
    assert _reason(Language(languages=("zh", language)), text) is None


def test_chinese_is_kept() -> None:
    for text in PROSE.values():
        assert _reason(Language(), text) is None
    assert _reason(Language(), "我们用 Python 和 C++ 写程序，用 GitHub 管理代码，用 Docker 部署服务。") is None
    for text in (
        "2.自带的vista home 不实用",
        "High Difinition Audio 驱动装不上 能发声音就让它去",
        "到bios修改ahci到ide然后",
    ):
        assert _reason(Language(), text) is None
    assert _reason(Language(languages=("en",)), PROSE["news"]) == "language zh with probability 1.00"
    assert _reason(Language(), "") is None


def test_a_language_on_the_later_pages_only_counts_for_the_whole() -> None:
    assert _reason(Language(), "English first. " * 30 + "然后是中文，" * 100) is None
