"""Links and numbers that lead to a person."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.data.wudao.rules import Cleaner
from megatron_moe.data.wudao.rules.privacy import (
    BankCards,
    Contacts,
    Emails,
    IdCards,
    Phones,
    Urls,
    valid_id_card,
    valid_luhn,
)

CASES = [
    (Urls(), "见http://a.com/b?c=d。后", "见。后"),
    (Urls(), "（http://a.com）后", "后"),
    (Urls(), "www.baidu.com/x是", "是"),
    (Urls(), "HTTPS://A.B，ftp://c.d/e；", "，；"),
    (Urls(), "网址http://x.cn/a_(b)。", "网址)。"),
    (Urls(replacement="[链接]"), "（http://a.com）后", "（[链接]）后"),
    (Emails(), "联系 zhang.san+x@mail.example.com.cn。", "联系 [邮箱]。"),
    (Emails(), "中文a@b.cn中文", "中文[邮箱]中文"),
    (Emails(replacement=""), "信箱：foo＠163.com", "信箱："),
    (Phones(), "电话：138-0013-8000", "电话：[电话]"),
    (Phones(), "+86 138 0013 8000", "[电话]"),
    (Phones(), "8613800138000", "[电话]"),
    (Phones(), "１３８００１３８０００", "[电话]"),
    (Phones(), "010-62345678转123，(0531)86012345", "[电话]，[电话]"),
    (Phones(), "（０１０）６２３４５６７８", "[电话]"),
    (Phones(), "400-820-8820、800-8208820", "[电话]、[电话]"),
    (Phones(), "13800138000或13900139000", "[电话]或[电话]"),
    (IdCards(), "11010519491231002X和１１０１０５１９４９１２３１００２Ｘ", "[身份证号]和[身份证号]"),
    (IdCards(), "身份证：110105491231002", "身份证：[身份证号]"),
    (BankCards(), "6222021234567890128", "[银行卡号]"),
    (BankCards(), "卡号 6222 0212 3456 7890 128", "卡号 [银行卡号]"),
    (BankCards(), "4111111111111111", "[银行卡号]"),
    (Contacts(), "QQ：12345678，加QQ群123456789", "QQ：[QQ号]，加QQ群[QQ号]"),
    (Contacts(), "微信号：abc_12345", "微信号：[微信号]"),
    (Contacts(), "请加微信 hello123，vx：abcdefg", "请加微信 [微信号]，vx：[微信号]"),
    (Contacts(qq="", wechat=""), "QQ:10001。微信号abc-123。", "QQ:。微信号。"),
]


@pytest.mark.parametrize(("rule", "dirty", "clean"), CASES)
def test_masked(rule: Cleaner, dirty: str, clean: str) -> None:
    assert rule.clean(dirty) == clean
    assert rule.clean(clean) == clean


KEPT: dict[Cleaner, str] = {
    Urls(): "百度baidu.com|www.是|http://|a://b|www..com",
    Emails(): "@人民日报|a@b|@property\ndef f|x @ y.com|价格@100",
    Phones(): "13000000000元|2010-2011|1998年12月31日|12345678901|138001380001|0.13800138000|110 120 12345"
    "|13800138000人|ISBN 978-7-5322-1234-5|A13800138000|010-12345678|3.14159265358|2008-08-08 20:00:00",
    IdCards(): "110105194912310021|99010519491231002X|11010519491331002X|编号110105491231002|2110105194912310021",
    BankCards(): "6222021234567890123|4111111111111112|20200101123456789012|1234567890123456|62220212345678901289012",
    Contacts(): "QQ2008版|QQ音乐|QQ10000人|微信公众号：renminribao|微信支付abc|用微信 Android 版|微信是Tencent的产品",
}


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in KEPT.items() for text in texts.split("|")])
def test_not_masked(rule: Cleaner, text: str) -> None:
    assert rule.clean(text) == text


@given(st.integers(0, 10**17 - 1), st.sampled_from("0123456789X"))
def test_the_check_character_of_id_cards(number: int, check: str) -> None:
    """GB 11643: the number with its check character as the last digit is 1 modulo 11, in powers of 2."""
    digits = f"11{number:017d}"[:17]
    weighed = [int(digit) << (17 - place) for place, digit in enumerate(digits)]
    total = sum(weighed) + (10 if check == "X" else int(check))
    assert valid_id_card(digits + check) == (total % 11 == 1)


@given(st.integers(0, 10**15 - 1), st.integers(0, 9))
def test_luhn(number: int, check: int) -> None:
    digits = f"{number:015d}{check}"
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    assert valid_luhn(digits) == ((doubled + sum(map(int, digits[-1::-2]))) % 10 == 0)


def test_a_replacement_that_is_a_link_is_refused() -> None:
    with pytest.raises(Exception, match=r"urls\.replacement http://a\.b: must be no link itself"):
        Urls(replacement="http://a.b")
