"""Traditional writing, and the table of kinds."""

import pytest

from megatron_moe.data.wudao.rules import characters
from megatron_moe.data.wudao.rules.characters import View, class_ranges, kinds_table
from megatron_moe.data.wudao.rules.script import Simplified, converter


@pytest.mark.parametrize(
    ("traditional", "simplified"),
    [
        ("臺灣的國語", "台湾的国语"),
        ("乾燥的頭髮和皇后，乾隆的著作", "干燥的头发和皇后，乾隆的著作"),
        ("後來他們去了", "后来他们去了"),
        ("\ud800國", "\ud800国"),
        ("復吳祕正五詩", "复吴秘正五诗"),
    ],
)
def test_traditional_text_is_written_in_simplified_characters(traditional: str, simplified: str) -> None:
    assert Simplified().clean(traditional) == simplified


def test_simplified_text_with_a_traditional_quotation_stays() -> None:
    text = "这篇文章里引用了“國”字。" + "其余都是简体。" * 20
    assert Simplified().clean(text) == text
    assert Simplified(share=0.0).clean(text) == text.replace("國", "国")


def test_what_opencc_leaves_is_not_called_traditional() -> None:
    for character in characters.traditional_characters():
        assert converter().convert(character) != character
    assert not set("著乾瞭徵藉於的一是了我不人在他有这个上们来到时大地为子中") & characters.traditional_characters()


@pytest.mark.parametrize(
    ("text", "bit"),
    [("汉", characters.HAN), ("𰻝", characters.HAN), ("〇", characters.HAN), ("\u3000", characters.SPACE),
    ("\n", characters.NEWLINE),
     ("\r", characters.STRAY), ("\ud800", characters.STRAY), ("<", characters.MARKUP), ("９", characters.DIGIT),
     ("Ａ", characters.LATIN), ("я", characters.LETTER), ("國", characters.TRADITIONAL), ("⼀", characters.FORM),
     ("鐨", characters.SUSPECT), ("…", characters.MARK), ("＠", characters.AT), ("カ", characters.KANA),
     ("138-0013", characters.NUMBER), ("12345", characters.NUMBER)],
)  # fmt: skip
def test_kinds(text: str, bit: int) -> None:
    assert View(text).bits & bit


def test_plain_chinese_is_of_few_kinds() -> None:
    assert View("今天的天气很好").bits == characters.HAN | characters.ALWAYS
    assert View("今天，很好。").bits == characters.HAN | characters.MARK | characters.TIGHT | characters.ALWAYS
    assert View("1998年").bits == characters.HAN | characters.DIGIT | characters.ALWAYS
    assert View("").bits == View("¡").bits == characters.ALWAYS


def test_class_ranges() -> None:
    assert class_ranges("a-cx") == [(97, 99), (120, 120)]
    assert kinds_table()[ord("\u206f")] & characters.STRAY
