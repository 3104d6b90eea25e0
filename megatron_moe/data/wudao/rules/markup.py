"""What extraction from HTML left behind: tags, comments, scripts, character references."""

import html
import re
from dataclasses import dataclass
from typing import ClassVar

from megatron_moe.data.wudao.rules import characters
from megatron_moe.data.wudao.rules.base import Cleaner

# Tags that end a line or a block, and those inside of a line. Only these: `x<y`, List<String> and <三国> are no tags.
_BLOCK = (
    "address article aside blockquote body br caption center dd div dl dt fieldset figcaption figure footer form "
    "frameset h1 h2 h3 h4 h5 h6 head header hr html legend li main nav ol optgroup option p pre section select table "
    "tbody td tfoot th thead title tr ul"
)
_INLINE = (
    "a abbr acronym applet area audio b base basefont bdo big button canvas cite code col colgroup del dfn em embed "
    "font frame i iframe img input ins kbd label link map marquee meta noframes noscript object param q s samp script "
    "small source span strike strong style sub sup svg textarea tt u var video wbr o:p"
)
# Attributes with quoted values may hold < and >; nothing is tried twice.
_ATTRIBUTES = r"""(?:\s(?:[^<>"']|"[^"<>\n]*+"|'[^'<>\n]*+')*+)?+"""
# A tag that is spoken of, as tutorials do, is text.
_SPOKEN_OF = "(?![ ”’」』`]*+(?:标签|标记|元素|和|与|或|、|，|是|属性))"


def _tag(names: str) -> re.Pattern[str]:
    return re.compile(f"</?(?:{names.replace(' ', '|')}){_ATTRIBUTES}/?>{_SPOKEN_OF}", re.IGNORECASE)


_BLOCK_TAG = _tag(_BLOCK)
_INLINE_TAG = _tag(_INLINE)
_ELEMENT = re.compile(r"<(script|style)\b[^<>]*+>(?:[^<]++|<(?!/\1))*+</\1\s*+>", re.IGNORECASE)
_COMMENT = re.compile(r"<!--(?:[^-]++|-(?!->))*+-->|<!DOCTYPE\b[^<>]*+>|<!\[CDATA\[|\]\]>", re.IGNORECASE)
# With the semicolon only: R&D, AT&T and ?a=1&lt=2 are text.
_REFERENCE = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


@dataclass(frozen=True)
class Html(Cleaner):
    """Removes HTML tags, comments and the content of script and style elements, and decodes character references.

    Block tags become line ends. Tags are told by HTML's own names, so generics of code and comparisons stay; so do tags
    that the text speaks of (<p>标签).
    """

    name: ClassVar[str] = "html"
    source: ClassVar[str] = "WuDaoCorpora (HTML and script residue)"
    destroys: ClassVar[str] = "examples of HTML in tutorials"
    needs: ClassVar[int] = characters.MARKUP
    titles: ClassVar[bool] = True

    def clean(self, text: str) -> str:
        """Remove and decode until nothing is left: pages hold &amp;nbsp; and &lt;br&gt; too."""
        while True:
            before = text
            if "<" in text:
                text = _COMMENT.sub("", _ELEMENT.sub("\n", text))
                text = _INLINE_TAG.sub("", _BLOCK_TAG.sub("\n", text))
            if "&" in text:
                text = _REFERENCE.sub(_decoded, text)
            if text == before:
                return text


def _decoded(match: re.Match[str]) -> str:
    decoded = html.unescape(match.group())
    # html.unescape leaves what it does not know, and gives U+FFFD for numbers that are no character.
    return "" if decoded == "\ufffd" else decoded.replace("\xa0", " ")


# What counters, share buttons and advertisements of Chinese sites leave: statements, never prose.
_BEGINNINGS = (
    r"var\s+\w+\s*=",
    r"(?:window|document|location)\.\w+",
    r"_(?:hmt|gaq)\.push",
    r"\(adsbygoogle\b",
    r"google_ad_\w+\s*=",
    r"BAIDU_CLB_",
    r"\$\((?:document|function|'|\")",
    r"function\s*\w*\s*\([^)\n]*\)\s*\{",
    r"with\s*\(document\)",
    r"\}\s*\)\s*\(",
    r"@import\s+url",
    r"[.#]?[\w-]++(?:[ ,>.#]++[\w-]++)*+\s*+\{[^{}\n]*+:[^{}\n]*+\}\s*+$",
)
_STATEMENT = re.compile(rf"^[ \t\u3000]*+(?:{'|'.join(_BEGINNINGS)})[^\n]*$\n?", re.MULTILINE)


@dataclass(frozen=True)
class Scripts(Cleaner):
    """Drops lines that are JavaScript or CSS of the page around the text: no Han character and a known beginning."""

    name: ClassVar[str] = "scripts"
    source: ClassVar[str] = "WuDaoCorpora (JavaScript residue); the list of beginnings is ours"
    destroys: ClassVar[str] = "lines of browser code in programming articles"
    needs: ClassVar[int] = characters.LATIN
    adds: ClassVar[bool] = False

    def clean(self, text: str) -> str:
        """Drop the lines."""
        if "(" not in text and "{" not in text and "=" not in text:
            return text
        return _STATEMENT.sub(lambda match: match.group() if _HAN.search(match.group()) else "", text)


_HAN = re.compile(f"[{characters.HAN_CLASS}]")
