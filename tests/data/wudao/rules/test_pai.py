"""The recipe `pai` against Pai-Megatron-Patch's steps, spelled out one character at a time, and what they destroy."""

import dataclasses
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.data.wudao.document import Document
from megatron_moe.data.wudao.recipe import load_recipe
from megatron_moe.data.wudao.rules.pai import Pai
from tests.data.chinese_text import documents
from tests.data.wudao.rules.text import PROSE, dirty_text

# `[$-_@.&+]` is the range from $ to _, `[!*\(\),]` adds the exclamation mark.
LINK = set(string.ascii_letters + string.digits + "$%&'()*+,-./:;<=>?@[\\]^_!")
KEPT = set(string.ascii_letters + string.digits) | set(".\uff0c ,-\u3002%\u300a*\u300b/\u2022\u3001&\uff06(\u2014)")
KEPT |= set("\uff08+\uff09\uff1a\uff1f!\uff01\u201c\u201d\xb7") | set(map(chr, range(0x4E00, 0x9FA6)))


def naive(text: str) -> str:
    """The steps of `clean_text`, without regular expressions."""
    without_links = ""
    place = 0
    while place < len(text):
        for scheme in ("https://", "http://"):
            end = place + len(scheme)
            if text.startswith(scheme, place) and text[end : end + 1] in LINK and end < len(text):
                while end < len(text) and text[end] in LINK:
                    end += 1
                place = end
                break
        else:
            without_links += text[place]
            place += 1
    while "  " in without_links:
        without_links = without_links.replace("  ", " ")
    return "".join(character for character in without_links if character in KEPT).strip()


@given(st.text() | dirty_text() | st.text(st.characters(exclude_categories=[])))
@settings(max_examples=500, deadline=None)
def test_any_text(text: str) -> None:
    assert Pai().clean(text) == naive(text)


@given(st.text(st.sampled_from("http:/s .中;&'~#!\n　"), max_size=60))
@settings(max_examples=500, deadline=None)
def test_text_of_links_and_spaces(text: str) -> None:
    assert Pai().clean(text) == naive(text)


def test_every_character() -> None:
    text = "".join(map(chr, range(0x110000)))
    assert Pai().clean(text) == naive(text)


def test_prose() -> None:
    for text in [*PROSE.values(), *documents(100)]:
        assert Pai().clean(text) == naive(text)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("二〇〇八年八月八日12:30；", "二八年八月八日1230"),
        ("第一段。\n第二段。", "第一段。第二段。"),
        ("a@b.com 手机13800138000", "ab.com 手机13800138000"),
        ("<p>&nbsp;广告</p>", "p&nbsp广告/p"),
        ("x=1;y<2", "x1y2"),
        ("-5℃，100㎡", "-5，100"),
        ("【注】「引文」‘话’", "注引文话"),
        ("１９９８年", "年"),
        ("他说……好；是吗", "他说好是吗"),
        ("㐂、𠮷、龦", "、、"),
        ("《a》：“b”？", "《a》：“b”？"),
        ("什么?好", "什么好"),
        ("见http://a.com,然后", "见然后"),
        ("见http://a.com!好然后", "见好然后"),
        ("甲  乙\t丙　丁", "甲 乙丙丁"),
        ("甲 ; 乙", "甲  乙"),
        ("ht;tp://a.b", "http//a.b"),
    ],
)
def test_what_it_destroys(before: str, after: str) -> None:
    assert Pai().clean(before) == after


class _Silent:
    def changed(self, rule: str, before: str, after: str) -> None: ...

    def dropped(self, rule: str, reason: str, text: str) -> None:
        raise AssertionError(reason)


@given(st.text(max_size=50))
@settings(deadline=None)
def test_the_recipe_writes_its_records(text: str) -> None:
    recipe = load_recipe("pai")
    document = Document(text, title="标题", meta={"id": 1})
    assert recipe.apply(document, _Silent())
    record = recipe.record.of(document)
    assert record == {"instruction": "", "input": "", "text": naive(text)}
    assert list(record) == ["instruction", "input", "text"]


def test_the_other_script_writes_the_text_alone() -> None:
    recipe = load_recipe("pai", ["record.constants={}"])
    assert recipe.record.of(Document("甲", meta={"id": 1})) == {"text": "甲"}
    assert dataclasses.asdict(recipe.record)["constants"] == {}
