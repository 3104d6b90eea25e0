"""Which kinds of characters a text holds: one pass over it tells every rule whether it has anything to do.

A table gives each code point a few bits; the bits of a text are those of its characters together. A rule names the bits
it needs (`Rule.needs`) and is not even called without them, so clean text costs one look-up in the table.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

HAN = 1
"""The lowest bit, so that a sum counts. Han characters, rare ones too, 〇 and 々."""
SPACE = 1 << 1
"""White space other than the line feed."""
NEWLINE = 1 << 2
STRAY = 1 << 3
"""Control characters, other line ends, zero-width and private characters: what the rule `control` acts on."""
MARKUP = 1 << 4
"""< and &."""
DIGIT = 1 << 5
"""Also full-width ones."""
LATIN = 1 << 6
"""Letters A to Z, also full-width ones."""
LETTER = 1 << 7
"""Letters of scripts other than Han and Latin."""
TRADITIONAL = 1 << 8
"""Characters that only traditional writing has."""
FORM = 1 << 9
"""Characters that have a canonical form other than themselves, or may combine with their neighbours."""
SUSPECT = 1 << 10
"""Characters that text decoded with the wrong encoding is full of."""
MARK = 1 << 11
"""Punctuation that is repeated for emphasis or by mistake."""
AT = 1 << 12
KANA = 1 << 13
"""Japanese syllables and Korean letters."""
TIGHT = 1 << 14
"""Chinese punctuation that carries its own space, so that a space beside it says nothing."""
NUMBER = 1 << 16
"""Five digits in a row, or groups with a separator, as of a telephone or a card; seen in the text, not the table."""
ALWAYS = 1 << 17
"""A bit of every text, for rules that must see all."""

HAN_CLASS = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
"""The Han characters as the inside of a regular expression's brackets: URO, Extensions A to H, compatibility forms."""
CJK_PUNCTUATION_CLASS = "\u3001-\u3003\u3008-\u3011\u3014-\u301f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
"""Punctuation of Chinese typesetting, without the quotes, dashes and dots that other scripts use too."""
CLOSING_MARKS = "，。！？；：、）》」』】〉"
OPENING_MARKS = "（《「『【〈"
MARKS = "！？!?。，、；：…—～~"

_HAN_RANGES = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF))
_KANA_RANGES = ((0x3041, 0x3096), (0x30A1, 0x30FA), (0x31F0, 0x31FF), (0xFF66, 0xFF9D), (0xAC00, 0xD7A3))
_LONG_NUMBER = re.compile("[0-9０-９]{3}(?:[0-9０-９]{2}|[0-9０-９]?[-－—()（） ]{1,3}[0-9０-９]{3})")
# Texts below this length are looked up together, so many at once: larger arrays no longer fit the processor's cache.
_SHORT, _BATCH = 512, 128
_ASSIGNED_LETTERS = 0x20000
# Soft hyphen, Arabic letter mark, zero-width space, direction marks, word joiner and invisible operators, byte order
# mark. Not the zero-width (non-)joiner, which emoji and Indic scripts are written with.
INVISIBLE = "\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
LINE_ENDS = "\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029"
PRIVATE = "\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd"
# Half of a surrogate pair, noncharacters, and tags (which only flags are written with).
BROKEN = "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U000e0001-\U000e007f"
ODD_SPACES = "\xa0\u1680\u2000-\u200a\u202f\u205f"
CONTROLS = "\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f"
# What the first byte of a Chinese character's UTF-8 becomes in Windows-1252.
_MISREAD_LATIN = ((0xC2, 0xF4),)


@functools.cache
def misread_gbk() -> str:
    """What the first two bytes of a Chinese character become in GBK (鐨 of 的, 銆 of 。), without common characters.

    GB 2312 has the common characters of Chinese below 0xD8 (its level 1, by pronunciation).
    """
    found = []
    for lead in (0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEF):
        for trail in range(0x80, 0xC0):
            character = bytes((lead, trail)).decode("gbk", "ignore")
            if character and (not _encodes(character, "gb2312") or character.encode("gb2312")[0] >= 0xD8):
                found.append(character)
    return "".join(found)


def codes_of(text: str) -> npt.NDArray[np.uint32]:
    """The code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


@functools.cache
def kinds_table() -> npt.NDArray[np.uint16]:
    """The bits of every code point; 2 MB, of which text uses a few KB."""
    table = np.zeros(0x110000, dtype=np.uint16)
    for first, last in _HAN_RANGES:
        table[first : last + 1] |= HAN
    for character in "〇々":
        table[ord(character)] |= HAN
    for code in range(_ASSIGNED_LETTERS):
        character = chr(code)
        if character.isspace() and character != "\n":
            table[code] |= SPACE
        elif character.isalpha() and not table[code] & HAN:
            table[code] |= LETTER
    table[ord("\n")] |= NEWLINE
    for first, last in _KANA_RANGES:
        table[first : last + 1] |= KANA
    for start in (0x41, 0x61, 0xFF21, 0xFF41):
        table[start : start + 26] = (table[start : start + 26] | LATIN) & ~np.uint16(LETTER)
    for start in (0x30, 0xFF10):
        table[start : start + 10] |= DIGIT
    for character in "<&":
        table[ord(character)] |= MARKUP
    for character in "@＠":
        table[ord(character)] |= AT
    for character in MARKS + ".":
        table[ord(character)] |= MARK
    for character in CLOSING_MARKS + OPENING_MARKS:
        table[ord(character)] |= TIGHT
    for classes in (INVISIBLE, LINE_ENDS, PRIVATE, BROKEN, CONTROLS):
        for first, last in class_ranges(classes):
            table[first : last + 1] |= STRAY
    for first, last in _MISREAD_LATIN:
        table[first : last + 1] |= SUSPECT
    for character in misread_gbk() + "\ufffd锟烫屯":
        table[ord(character)] |= SUSPECT
    for code in forms():
        table[code] |= FORM
    for character in traditional_characters():
        table[ord(character)] |= TRADITIONAL
    return table


def class_ranges(inside: str) -> list[tuple[int, int]]:
    """The code point ranges of the inside of a regular expression's brackets (characters and a-b, no escapes)."""
    ranges = []
    position = 0
    while position < len(inside):
        last = position
        if inside[position + 1 : position + 2] == "-":
            last = position + 2
        ranges.append((ord(inside[position]), ord(inside[last])))
        position = last + 1
    return ranges


@functools.cache
def forms() -> frozenset[int]:
    """Code points that canonical composition (NFC) or the rule `forms` may change, alone or with their neighbours."""
    found = set(range(0x2E80, 0x2FE0)) | set(range(0xFE10, 0xFE1A)) | set(range(0xFE30, 0xFE50))
    found |= set(range(0xFF61, 0xFF66)) | set(range(0x1100, 0x1200))
    found |= {code for first, last in class_ranges(ODD_SPACES) for code in range(first, last + 1)}
    for code in range(0x80, 0x30000):
        character = chr(code)
        if unicodedata.category(character).startswith("M") or not unicodedata.is_normalized("NFC", character):
            found.add(code)
    # A variation selector chooses a glyph and combines with nothing.
    return frozenset(found - set(range(0xFE00, 0xFE10)) - set(range(0xD800, 0xE000)))


@functools.cache
def traditional_characters() -> frozenset[str]:
    """Characters that OpenCC's t2s changes and that GB 2312, the standard of simplified writing, does not have.

    著, 乾, 瞭, 徵 and others are written in both, so they do not make a text traditional.
    """
    # The script module needs this one.
    from megatron_moe.data.wudao.rules.script import converter

    han = [chr(code) for code in range(0x3400, 0xA000)]
    simplified = converter().convert("\n".join(han)).split("\n")
    changed = {old for old, new in zip(han, simplified, strict=True) if old != new}
    return frozenset(character for character in changed if not _encodes(character, "gb2312"))


def _encodes(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _number(text: str) -> int:
    """The bit NUMBER if there are digits enough for a telephone or card number."""
    return NUMBER if _LONG_NUMBER.search(text) else 0


class View:
    """A text with the kinds of its characters.

    Attributes:
        text: the text.
        bits: the kinds of all its characters together; of a text that lost some it may have more.
    """

    __slots__ = ("_han", "_kinds", "bits", "text")

    def __init__(
        self,
        text: str,
        bits: int | None = None,
        kinds: npt.NDArray[np.uint16] | None = None,
        han: int | None = None,
    ) -> None:
        self.text = text
        self._kinds = kinds
        self._han = han
        if bits is None:
            bits = int(np.bitwise_or.reduce(self.kinds))
            if bits & DIGIT:
                bits |= _number(text)
        self.bits = bits | ALWAYS

    @property
    def kinds(self) -> npt.NDArray[np.uint16]:
        """The bits of each character."""
        if self._kinds is None:
            self._kinds = kinds_table().take(codes_of(self.text))
        return self._kinds

    @property
    def han(self) -> int:
        """How many characters are Han."""
        if self._han is None:
            self._han = self.count(HAN)
        return self._han

    def count(self, kind: int) -> int:
        """How many characters have any of these bits."""
        return int(np.count_nonzero(self.kinds & kind))

    @property
    def visible(self) -> int:
        """How many characters are no white space."""
        if not self.bits & (SPACE | NEWLINE):
            return len(self.text)
        return len(self.text) - self.count(SPACE | NEWLINE)


def views_of(texts: Sequence[str]) -> list[View]:
    """The views of many texts, several times faster than one by one where they are short."""
    short = _short_views([text for text in texts if len(text) < _SHORT])
    return [next(short) if len(text) < _SHORT else View(text) for text in texts]


def _short_views(texts: Sequence[str]) -> Iterator[View]:
    for begin in range(0, len(texts), _BATCH):
        yield from _views(texts[begin : begin + _BATCH])


def _views(texts: Sequence[str]) -> Iterator[View]:
    kinds = kinds_table().take(codes_of("".join(texts)))
    ends = np.cumsum(np.fromiter(map(len, texts), dtype=np.int64, count=len(texts)))
    # Where a text is empty, reduceat takes the next one's first character: the range is mended below.
    starts = np.minimum(ends - np.diff(ends, prepend=0), max(0, len(kinds) - 1))
    empty = not len(kinds)
    bits = [0] * len(texts) if empty else np.bitwise_or.reduceat(kinds, starts).tolist()
    han = [0] * len(texts) if empty else np.add.reduceat(kinds & HAN, starts, dtype=np.int64).tolist()
    begin = 0
    for text, end, found, count in zip(texts, ends.tolist(), bits, han, strict=True):
        if begin == end:
            found = count = 0
        elif found & DIGIT:
            found |= _number(text)
        yield View(text, found, kinds[begin:end], count)
        begin = end
