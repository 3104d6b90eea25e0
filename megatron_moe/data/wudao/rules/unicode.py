"""Characters that are not what the author wrote: wrong decoding, control characters, presentation forms, garbage."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megatron_moe.data.files import require_package
from megatron_moe.data.wudao.rules import characters
from megatron_moe.data.wudao.rules.base import Cleaner

# What Windows-1252 makes of the bytes 0x80 to 0x9F, and Latin-1 of the upper half.
_UPPER_BYTES = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ\x80-\xff"
# A lead byte of three and two or more trail bytes: what one Chinese character becomes.
_MISREAD = re.compile(f"[{_UPPER_BYTES}]*[\xc2-\xf4][{_UPPER_BYTES} ]*[{_UPPER_BYTES}]")
_MISREAD_GBK = re.compile(f"[{characters.misread_gbk()}]")
_CHINESE = re.compile(f"[{characters.HAN_CLASS}{characters.CJK_PUNCTUATION_CLASS}]")


@dataclass(frozen=True)
class Mojibake(Cleaner):
    """Mends UTF-8 that was read as Windows-1252 (ftfy) or as GBK: 你好 comes out of ä½\xa0å¥½ and of 浣犲ソ.

    Only what decodes without loss is changed, piece by piece, and only if Chinese comes out of it.
    """

    name: ClassVar[str] = "mojibake"
    source: ClassVar[str] = "WuDaoCorpora (garbled text); ftfy's fix_encoding"
    needs: ClassVar[int] = characters.SUSPECT
    titles: ClassVar[bool] = True

    def prepare(self) -> None:
        """Load ftfy."""
        require_package("ftfy", "--recipe")

    def identity(self) -> dict[str, Any]:
        """With ftfy's version."""
        return {**super().identity(), "ftfy": require_package("ftfy", "--recipe").__version__}

    def clean(self, text: str) -> str:
        """Mend every piece that can be."""
        text = _MISREAD.sub(_mended_latin, text)
        if _MISREAD_GBK.search(text):
            text = "\n".join(map(_mended_gbk, text.split("\n")))
        return text


def _mended_latin(match: re.Match[str]) -> str:
    mended: str = require_package("ftfy", "--recipe").fix_encoding(match.group())
    return mended if _CHINESE.search(mended) else match.group()


def _mended_gbk(line: str) -> str:
    """A line of UTF-8 read as GBK decodes as UTF-8 once more.

    So do a few lines of two or three rare characters (婵娟 is one), but no common Chinese comes out of these.
    """
    if not _MISREAD_GBK.search(line):
        return line
    # Indentation is not part of it: an ideographic space would have become 銆€.
    misread = line.strip(" \t\u3000")
    try:
        mended = misread.encode("gb18030").decode("utf-8")
        mended.encode("gb2312")
    except UnicodeError:
        return line
    return line.replace(misread, mended) if len(_CHINESE.findall(mended)) >= 2 else line


_LINE_END = re.compile(f"\r\n|[{characters.LINE_ENDS}]")
# Control sequences (colours, cursor), operating system commands (window titles), and short escapes of terminals.
_ANSI = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b\n]*(?:\x07|\x1b\\\\)|\x1b[ -/]+[0-~]|\x1b[@-Z\\\\^_]"
)
# Typewriters and manual pages print bold and underlined text by striking twice.
_OVERSTRIKE = re.compile("[^\n\x08]\x08")
_STRAY = re.compile(f"[{characters.CONTROLS}{characters.INVISIBLE}{characters.BROKEN}]+")
_STRAY_AND_PRIVATE = re.compile(
    f"[{characters.CONTROLS}{characters.INVISIBLE}{characters.BROKEN}{characters.PRIVATE}]+"
)


def _han_of_private_use() -> dict[int, str]:
    """The 80 Han that GBK kept at FE50 to FEA0, which old converters put at U+E815 to U+E864 for want of a place.

    GB 18030 of 2000, which Python's codec has, places 66 of them; the other 14 got theirs later (GB 18030-2005).
    """
    codes = (bytes((0xFE, low)) for low in range(0x50, 0xA1) if low != 0x7F)
    table = {0xE815 + number: code.decode("gb18030") for number, code in enumerate(codes)}
    return table | dict(
        zip(
            map(ord, "\ue816\ue817\ue818\ue81e\ue826\ue82b\ue82c\ue831\ue832\ue83b\ue843\ue854\ue855\ue864"),
            "\U00020087\U00020089\U000200cc龴龵龶龷\U000215d7龸\U0002298f龹龺\U000241fe龻",
            strict=True,
        )
    )


_HAN_OF_PRIVATE_USE = _han_of_private_use()
_PRIVATE_HAN = re.compile("[\ue815-\ue864]")


@dataclass(frozen=True)
class Control(Cleaner):
    """Removes control characters, terminal colours, zero-width characters and halves of pairs.

    All line ends become line feeds. Tabs, the joiners inside emoji and variation selectors stay. Rare Han that GBK
    files have in the private area get the code points that Unicode gave them later.
    """

    private_use: Literal["remove", "keep"] = "remove"
    """Other characters of the private areas: icons of web fonts, or rare Han of HKSCS and vendors."""

    name: ClassVar[str] = "control"
    source: ClassVar[str] = "WuDaoCorpora (control and invisible characters)"
    destroys: ClassVar[str] = "rare Han that HKSCS and vendors put in the private areas, unless private_use is keep"
    version: ClassVar[int] = 2
    needs: ClassVar[int] = characters.STRAY
    titles: ClassVar[bool] = True

    def clean(self, text: str) -> str:
        """Remove them."""
        text = _LINE_END.sub("\n", text)
        if "\x1b" in text or "\x9b" in text:
            text = _ANSI.sub("", text)
        while "\x08" in text:
            shorter = _OVERSTRIKE.sub("", text)
            if shorter == text:
                break
            text = shorter
        text = _PRIVATE_HAN.sub(lambda match: _HAN_OF_PRIVATE_USE[ord(match.group())], text)
        return (_STRAY_AND_PRIVATE if self.private_use == "remove" else _STRAY).sub("", text)


_ODD_SPACE = re.compile(f"[{characters.ODD_SPACES}]")
_RADICAL = re.compile("[\u2e80-\u2fdf]")
# Radicals of the supplement that are a Han character of their own; compatibility mappings have none of these.
_RADICALS = str.maketrans(
    "⺠⻁⻄⻅⻆⻉⻋⻓⻔⻘⻙⻚⻛⻜⻝⻢⻣⻤⻥⻦⻧⻨⻩⻬⻮⻰", "民虎西见角贝车长门青韦页风飞食马骨鬼鱼鸟卤麦黄齐齿龙"
)
_HALF_WIDTH = re.compile("[\uff61-\uff65]")
# Beside Han only: faces are drawn with these too, as in o(︶︿︶)o.
_HAN = f"[{characters.HAN_CLASS}]"
_VERTICAL = re.compile(f"[\ufe10-\ufe19\ufe30-\ufe4f](?:(?<={_HAN}.)|(?={_HAN}))")
# Vertical forms as horizontal writing has them; Unicode maps some of them to ASCII, which is wrong for Chinese.
_HORIZONTAL = str.maketrans(
    "︐︑︒︓︔︕︖︗︘︙︱︳︴︵︶︷︸︹︺︻︼︽︾︿﹀﹁﹂﹃﹄﹇﹈｡｢｣､･",
    "，、。：；！？〖〗…—＿＿（）｛｝〔〕【】《》〈〉「」『』［］。「」、・",
)
_WIDE_LETTERS = {
    code: code - 0xFEE0
    for start, count in ((0xFF10, 10), (0xFF21, 26), (0xFF41, 26))
    for code in range(start, start + count)
}


def _horizontal(match: re.Match[str]) -> str:
    return match.group().translate(_HORIZONTAL)


@dataclass(frozen=True)
class Forms(Cleaner):
    """Gives each character its usual form: canonical composition (NFC), radicals of PDF files as Han, vertical (beside
    Han) and half-width punctuation as Chinese punctuation, no-break and typographic spaces as plain ones.

    Not NFKC, which turns ，：（）！？ into ASCII, ① into 1 and ㎡ into m2.
    """

    wide_letters: bool = False
    """Write full-width letters and digits (ＡＢＣ１２３) as ASCII; full-width punctuation stays."""

    name: ClassVar[str] = "forms"
    source: ClassVar[str] = "Unicode Standard Annex 15 (NFC) and the compatibility mappings of Kangxi radicals"
    destroys: ClassVar[str] = "the newspaper's full-width digits, where wide_letters is set"
    titles: ClassVar[bool] = True

    @property
    def needs(self) -> int:  # type: ignore[override]
        """Also letters and digits when those are changed."""
        return characters.FORM | (characters.LATIN | characters.DIGIT if self.wide_letters else 0)

    def identity(self) -> dict[str, Any]:
        """With the version of Unicode."""
        return {**super().identity(), "unicode": unicodedata.unidata_version}

    def clean(self, text: str) -> str:
        """Replace forms."""
        text = _ODD_SPACE.sub(" ", text)
        if _RADICAL.search(text):
            text = _RADICAL.sub(lambda match: unicodedata.normalize("NFKC", match.group()), text).translate(_RADICALS)
        text = _HALF_WIDTH.sub(_horizontal, text)
        text = _VERTICAL.sub(_horizontal, text)
        if self.wide_letters:
            text = text.translate(_WIDE_LETTERS)
        return unicodedata.normalize("NFC", text)


_GARBAGE = re.compile("\ufffd|锟斤拷|锟斤|烫烫烫|屯屯屯")


@dataclass(frozen=True)
class Garbage(Cleaner):
    """Drops lines full of what lost characters become (U+FFFD, 锟斤拷, 烫烫烫, 屯屯屯); removes these elsewhere."""

    share: float = 0.05
    """Drop a line when more than this share of its characters is garbage."""

    name: ClassVar[str] = "garbage"
    source: ClassVar[str] = "WuDaoCorpora (garbled text); the share is ours"
    destroys: ClassVar[str] = "texts about 锟斤拷 and 烫烫烫 themselves"
    needs: ClassVar[int] = characters.SUSPECT

    def __post_init__(self) -> None:
        self.require_share("share")

    def clean(self, text: str) -> str:
        """Drop or mend the lines."""
        return "\n".join(map(self._line, text.split("\n"))) if _GARBAGE.search(text) else text

    def _line(self, line: str) -> str:
        rest = line
        while _GARBAGE.search(rest):
            rest = _GARBAGE.sub("", rest)
        return "" if len(line) - len(rest) > self.share * len(line) else rest
