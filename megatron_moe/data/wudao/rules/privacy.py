"""Links, and what identifies or reaches a person: e-mail, telephone, QQ, WeChat, identity card, bank card.

Digits may be full-width, as newspapers print them. Each rule puts `replacement` in the place of what it found; an empty
one removes it.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.data.wudao.rules import characters
from megatron_moe.data.wudao.rules.base import Cleaner

_D = "[0-9０-９]"
_NOT_AFTER_NUMBER = "(?<![0-9０-９A-Za-z_])(?<![0-9０-９][.．-])"
_NOT_BEFORE_NUMBER = "(?![0-9０-９A-Za-z_]|[.．][0-9０-９])"
# A number with a unit is a quantity: 13000000000元.
_UNITS = (
    "元 美元 欧元 日元 人民币 万 亿 千 百 余 多 人 个 名 户 吨 公斤 千克 克 平方 立方 公里 千米 米 度 次 年 岁 % ％"
)
_NO_QUANTITY = f"(?! ?(?:{_UNITS.replace(' ', '|')}))"
_ASCII_DIGITS = str.maketrans("０１２３４５６７８９Ｘｘ", "0123456789Xx")

# Characters of RFC 3986. Chinese text goes on right after the link, so nothing else belongs to it.
_URL_CHARACTER = r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]"
_URL = re.compile(
    rf"(?:(?:https?|ftp)://|(?<![A-Za-z0-9.@/-])www\.(?=[A-Za-z0-9-]+\.)){_URL_CHARACTER}*[A-Za-z0-9/=_~#&%-]",
    re.IGNORECASE,
)
_BRACKETED = {"(": ")", "（": "）", "[": "]", "【": "】", "<": ">", "〈": "〉", "《": "》"}


@dataclass(frozen=True)
class Urls(Cleaner):
    """Removes links: http, https and ftp addresses and those that begin with www. Names of sites (baidu.com) stay."""

    replacement: str = ""
    """What stands in their place. Empty: brackets around nothing but the link go with it."""

    name: ClassVar[str] = "urls"
    source: ClassVar[str] = "WuDaoCorpora, Pai-Megatron-Patch; the characters are those of RFC 3986"
    needs: ClassVar[int] = characters.LATIN

    def __post_init__(self) -> None:
        self.require(not _URL.search(self.replacement), "replacement", "no link itself")

    def clean(self, text: str) -> str:
        """Remove them."""
        if "://" not in text and "www." not in text and "WWW." not in text:
            return text
        pieces: list[str] = []
        begin = 0
        for match in _URL.finditer(text):
            first, last = match.span()
            if first < begin:
                continue
            if not self.replacement and first > begin and _BRACKETED.get(text[first - 1]) == text[last : last + 1]:
                first, last = first - 1, last + 1
            pieces += (text[begin:first], self.replacement)
            begin = last
        pieces.append(text[begin:])
        return "".join(pieces)


_EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}[@＠](?:[A-Za-z0-9-]{1,63}[.．]){1,4}[A-Za-z]{2,24}(?![A-Za-z0-9])",
    re.ASCII,
)


@dataclass(frozen=True)
class Emails(Cleaner):
    """Masks e-mail addresses. Names after an @ alone (@人民日报) and decorators of code stay."""

    replacement: str = "[邮箱]"
    """What stands in their place."""

    name: ClassVar[str] = "emails"
    source: ClassVar[str] = "WuDaoCorpora (private data)"
    needs: ClassVar[int] = characters.AT

    def clean(self, text: str) -> str:
        """Mask them."""
        return _EMAIL.sub(lambda _: self.replacement, text)


_MOBILE = rf"(?:(?:[+＋]|00)?(?:86|８６)[- ]?)?[1１][3-9３-９]{_D}(?:[- ]?{_D}{{4}}){{2}}"
_AREA = f"[0０](?:[1１][0０]|[2２]{_D}|[3-9３-９]{_D}{{2}})"
_LANDLINE = rf"(?:[(（]{_AREA}[)）] ?|{_AREA}[-－—] ?)[2-8２-８]{_D}{{6,7}}(?:[-－—转]{_D}{{1,5}})?"
_SERVICE = rf"(?:400|800|４００|８００)(?:[-－]{_D}{{3}}[-－]{_D}{{4}}|[-－]{_D}{{4}}[-－]{_D}{{3}}|[-－]{_D}{{7}})"
_PHONE = re.compile(f"{_NOT_AFTER_NUMBER}(?:{_MOBILE}|{_LANDLINE}|{_SERVICE}){_NOT_BEFORE_NUMBER}{_NO_QUANTITY}")


@dataclass(frozen=True)
class Phones(Cleaner):
    """Masks Chinese telephone numbers: mobile (11 digits), with area code, and 400 and 800 numbers.

    Emergency and short numbers (110, 12345), years, ISBN, quantities and longer numbers stay.
    """

    replacement: str = "[电话]"
    """What stands in their place."""

    name: ClassVar[str] = "phones"
    source: ClassVar[str] = "WuDaoCorpora (private data); China's telephone numbering plan"
    destroys: ClassVar[str] = "numbers of 11 digits that only look like a mobile number, such as order numbers"
    needs: ClassVar[int] = characters.NUMBER

    def clean(self, text: str) -> str:
        """Mask them."""
        return _PHONE.sub(lambda _: self.replacement, text)


_QQ_NAMES = ("QQ", "qq", "Qq", "ＱＱ", "扣扣", "企鹅")
_WECHAT_NAMES = ("微信", "薇信", "威信", "weixin", "Weixin", "WeChat", "wechat", "Wechat", "VX", "vx", "Vx")
_SAID = "(?:群|号码|号|帐号|账号)*+[ \u3000]*+"
_QQ = re.compile(
    f"((?<![A-Za-z])(?:{'|'.join(_QQ_NAMES)})(?:交流|讨论|粉丝|客服)?{_SAID}(?:[:：是为][ \u3000]*+)?+)"
    f"[1-9１-９]{_D}{{4,10}}{_NOT_BEFORE_NUMBER}{_NO_QUANTITY}"
)
# Without a word or a colon before it, a name must hold a digit: 微信 Android 版 is none.
_WECHAT = re.compile(
    f"((?<![A-Za-z])(?:{'|'.join(_WECHAT_NAMES)})(?:(?:号码?|帐号|账号|ID|id)[ \u3000]*+(?:[:：是为][ \u3000]*+)?+"
    "|[ \u3000]*+[:：][ \u3000]*+|[ \u3000]++(?=[A-Za-z_-]++[0-9])))"
    "[A-Za-z][A-Za-z0-9_-]{5,19}(?![A-Za-z0-9_-])(?! [A-Za-z])"
)


@dataclass(frozen=True)
class Contacts(Cleaner):
    """Masks QQ numbers and WeChat names that are introduced as such; the words QQ and 微信, and 公众号, stay."""

    qq: str = "[QQ号]"
    """What stands in the place of a QQ number or group number."""
    wechat: str = "[微信号]"
    """What stands in the place of a WeChat name."""

    name: ClassVar[str] = "contacts"
    source: ClassVar[str] = "WuDaoCorpora (private data)"
    needs: ClassVar[int] = characters.NUMBER | characters.LATIN

    def clean(self, text: str) -> str:
        """Mask them."""
        if any(name in text for name in _QQ_NAMES):
            text = _QQ.sub(lambda match: match.group(1) + self.qq, text)
        if any(name in text for name in _WECHAT_NAMES):
            text = _WECHAT.sub(lambda match: match.group(1) + self.wechat, text)
        return text


# The provinces of GB/T 2260, and the residence permits of people from Hong Kong, Macau and Taiwan.
_PROVINCES = frozenset(
    [*range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66), 71, 81, 82, 83, 91]
)
_MONTH_DAY = "(?:[0０][1-9１-９]|[1１][0-2０-２])(?:[0０][1-9１-９]|[12１２][0-9０-９]|[3３][01０１])"
_ID_18 = re.compile(
    rf"{_NOT_AFTER_NUMBER}{_D}{{6}}(?:[1１][89８９]|[2２][0０]){_D}{{2}}{_MONTH_DAY}{_D}{{3}}[0-9０-９XxＸｘ]{_NOT_BEFORE_NUMBER}"
)
_ID_15 = re.compile(rf"(身份证[^0-9０-９\n]{{0,8}}){_D}{{6}}{_D}{{2}}{_MONTH_DAY}{_D}{{3}}{_NOT_BEFORE_NUMBER}")
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_ID_CHECK = "10X98765432"


def valid_id_card(number: str) -> bool:
    """Whether 18 ASCII characters are a citizen's identity number: province, and check character of GB 11643."""
    total = sum(int(digit) * weight for digit, weight in zip(number[:17], _ID_WEIGHTS, strict=True))
    return int(number[:2]) in _PROVINCES and _ID_CHECK[total % 11] == number[17].upper()


@dataclass(frozen=True)
class IdCards(Cleaner):
    """Masks numbers of identity cards: 18 characters with a valid date, province and check character.

    The 15 digits of cards before 1999 have no check, so they must follow 身份证.
    """

    replacement: str = "[身份证号]"
    """What stands in their place."""

    name: ClassVar[str] = "id_cards"
    source: ClassVar[str] = "WuDaoCorpora (private data); GB 11643-1999, GB/T 2260"
    needs: ClassVar[int] = characters.NUMBER

    def clean(self, text: str) -> str:
        """Mask them."""
        text = _ID_18.sub(self._checked, text)
        return _ID_15.sub(lambda match: match.group(1) + self.replacement, text) if "身份证" in text else text

    def _checked(self, match: re.Match[str]) -> str:
        number = match.group()
        return self.replacement if valid_id_card(number.translate(_ASCII_DIGITS)) else number


# UnionPay 62; Visa 4, MasterCard 51-55, JCB 35 with 16 digits. In one piece, or in fours with a space.
_CARD = re.compile(
    rf"{_NOT_AFTER_NUMBER}(?:[6６][2２]{_D}{{14,17}}|[6６][2２]{_D}{{2}}(?: {_D}{{4}}){{3}}(?: {_D}{{1,3}})?"
    rf"|(?:[4４]{_D}|[5５][1-5１-５]|[3３][5５]){_D}{{2}}(?: ?{_D}{{4}}){{3}}){_NOT_BEFORE_NUMBER}{_NO_QUANTITY}"
)


def valid_luhn(digits: str) -> bool:
    """Whether the last of the ASCII digits is the check digit of the others by Luhn's formula (ISO/IEC 7812)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


@dataclass(frozen=True)
class BankCards(Cleaner):
    """Masks numbers of bank cards: 16 to 19 digits with an issuer's prefix and a valid check digit."""

    replacement: str = "[银行卡号]"
    """What stands in their place."""

    name: ClassVar[str] = "bank_cards"
    source: ClassVar[str] = "WuDaoCorpora (private data); ISO/IEC 7812"
    destroys: ClassVar[str] = "one in ten of other numbers with 16 to 19 digits that begin like a card's"
    needs: ClassVar[int] = characters.NUMBER

    def clean(self, text: str) -> str:
        """Mask them."""
        return _CARD.sub(self._checked, text)

    def _checked(self, match: re.Match[str]) -> str:
        number = match.group()
        return self.replacement if valid_luhn(number.translate(_ASCII_DIGITS).replace(" ", "")) else number
