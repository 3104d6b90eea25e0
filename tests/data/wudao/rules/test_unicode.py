"""Wrong decoding, control characters, forms and garbage."""

import pytest

from megatron_moe.data.wudao.rules.unicode import Control, Forms, Garbage, Mojibake


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("ä½\xa0å¥½ï¼Œä¸–ç•Œ", "你好，世界"),
        ("前文“ä¸\xadå›½äººæ°‘”后文", "前文“中国人民”后文"),
        ("浣犲ソ", "你好"),
        ("正常的一行。\n涓崕浜烘皯鍏卞拰鍥�"[:-1], "正常的一行。\n涓崕浜烘皯鍏卞拰鍥"),
    ],
)
def test_mojibake_is_mended_where_nothing_is_lost(dirty: str, clean: str) -> None:
    assert Mojibake().clean(dirty) == clean


def test_mojibake_of_every_chinese_line_comes_back() -> None:
    for text in ("中华人民共和国", "今天的天气很好，我们去公园。", "二〇〇八年"):
        latin = text.encode().decode("latin-1")
        assert Mojibake().clean(latin) == text
        wrong = text.encode().decode("gb18030", "replace")
        if "\ufffd" not in wrong:
            assert Mojibake().clean(wrong) == text


@pytest.mark.parametrize(
    "text",
    [
        "café 5°C ±3 §·",
        "“Ångström”…",
        "价格€5–€10…",
        "锛是工具",
        "璇璇说：“好。”",
        "ÀÉÎ",
        "鑿溫嶺",
        "婵娟。",
        "纔入園",
        "楸婚氦",
        "榫橀潗",
    ],
)
def test_real_letters_are_no_mojibake(text: str) -> None:
    assert Mojibake().clean(text) == text


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("a\x00b\x1b[1;31m红\x1b[0m", "ab红"),
        ("\x1b]0;窗口\x07正文", "正文"),
        ("\x9b31m红", "红"),
        ("一\r\n二\r三\x0b四\u2028五\x85六", "一\n二\n三\n四\n五\n六"),
        ("零\u200b宽\ufeff和\u2060软\xad连", "零宽和软连"),
        ("N\x08NA\x08AM\x08ME", "NAME"),
        ("\ud800坏\udfff\uffff\ufdd0", "坏"),
        ("\ue000图标\U000f0000", "图标"),
        ("\x08", ""),
    ],
)
def test_control_characters_go(dirty: str, clean: str) -> None:
    assert Control().clean(dirty) == clean


@pytest.mark.parametrize("text", ["列\t列\n行", "👨\u200d👩\u200d👧❤️", "葛󠄀", "[0m 不是转义", "\u0e01\u0e33"])
def test_characters_with_a_meaning_stay(text: str) -> None:
    assert Control().clean(text) == text


def test_private_characters_stay_on_request() -> None:
    assert Control(private_use="keep").clean("\ue000㐂\x00") == "\ue000㐂"


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("e\u0301", "é"),
        ("⼀⼆⽂⻓", "一二文长"),
        ("︵你︶﹁好﹂", "（你）「好」"),
        ("｢你好｣｡", "「你好」。"),
        ("\uf900\U0002f800", "豈丽"),
        ("a\xa0b\u2003c", "a b c"),
    ],
)
def test_forms(dirty: str, clean: str) -> None:
    assert Forms().clean(dirty) == clean


@pytest.mark.parametrize(
    "text", ["，：；（）！？", "①㈠㎡℃％", "１２３ＡＢＣ", "〇㐂𠮷𬭎", "ｶﾅ", "“”‘’…—", "葛󠄀", "o(︶︿︶)o", "(︶^︶)"]
)
def test_chinese_forms_stay(text: str) -> None:
    assert Forms().clean(text) == text


def test_wide_letters_become_ascii_on_request() -> None:
    assert Forms(wide_letters=True).clean("１９９８年，ＡＢＣｘｙｚ：（％）") == "1998年，ABCxyz：（％）"


def test_garbage_lines_go_and_single_losses_are_removed() -> None:
    long = "这一行很长" * 10
    assert Garbage().clean(f"锟斤拷锟斤拷锟斤拷\n{long}\ufffd完") == f"\n{long}完"
    assert Garbage(share=0.0).clean(f"{long}\ufffd完\n好") == "\n好"
    assert Garbage().clean("烫手的山芋，屯屯") == "烫手的山芋，屯屯"


def test_han_that_gbk_kept_in_the_private_area_get_their_code_points() -> None:
    """As iconv's GB 18030 has them, and every place of the area but no other."""
    area = "".join(map(chr, range(0xE815, 0xE865)))
    mended = Control().clean(area)
    assert len(mended) == len(area)
    assert not any(0xE000 <= ord(character) <= 0xF8FF for character in mended)
    assert Control().clean("玉{\ue817氏}，\ue864，\ue816") == "玉{\U00020089氏}，\u9fbb，\U00020087"
    assert Control().clean("图\ue814标\ue865") == "图标"
    assert Control(private_use="keep").clean("\ue814\ue81e") == "\ue814\u9fb4"
