"""What extraction from HTML left behind: tags, comments, scripts, character references."""

import functools
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
# Quoted values may hold < and >; nothing is tried twice.
_ATTRIBUTES = r"""(?:\s(?:[^<>"']|"[^"\n]{0,300}+"|'[^'\n]{0,300}+')*+)?+"""
# A tag that is spoken of, as tutorials do, is text.
_SPOKEN_OF = "(?!(?:[、，和与或及 ]*+</?[A-Za-z0-9]++/?>){0,8}+[ ”’」』`]*+(?:标签|标记|元素|属性))"


def _tag(names: str) -> re.Pattern[str]:
    return re.compile(f"</?(?:{names.replace(' ', '|')}){_ATTRIBUTES}/?>{_SPOKEN_OF}", re.IGNORECASE)


_BLOCK_TAG = _tag(_BLOCK)
_INLINE_TAG = _tag(_INLINE)
_OPENINGS = (
    (re.compile(r"<script\b[^<>]*+>", re.IGNORECASE), re.compile(r"</script\s*+>", re.IGNORECASE), "\n"),
    (re.compile(r"<style\b[^<>]*+>", re.IGNORECASE), re.compile(r"</style\s*+>", re.IGNORECASE), "\n"),
    (re.compile("<!--"), re.compile("-->"), ""),
)
_DECLARATION = re.compile(r"<!DOCTYPE\b[^<>]*+>|<!\[CDATA\[|\]\]>", re.IGNORECASE)
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
                for opening, closing, instead in _OPENINGS:
                    text = _without(opening, closing, instead, text)
                text = _DECLARATION.sub("", text)
                text = _BLOCK_TAG.sub("\n", text)
                closed = {name for name in "abiqsu" if f"</{name}>" in text or f"</{name.upper()}>" in text}
                text = _INLINE_TAG.sub(functools.partial(_removed, closed), text)
            if "&" in text:
                text = _REFERENCE.sub(_decoded, text)
            if text == before:
                return text


def _without(opening: re.Pattern[str], closing: re.Pattern[str], instead: str, text: str) -> str:
    """The text without what stands between these, in time proportional to its length; what is never closed stays."""
    pieces: list[str] = []
    begin = 0
    while (first := opening.search(text, begin)) and (last := closing.search(text, first.end())):
        pieces += (text[begin : first.start()], instead)
        begin = last.end()
    return "".join([*pieces, text[begin:]])


def _removed(closed: set[str], match: re.Match[str]) -> str:
    """Nothing in a tag's place; a<b>c and <T> of one letter are tags only if they are closed somewhere."""
    tag = match.group()
    return tag if len(tag) == 3 and tag[1].lower() not in closed else ""


def _decoded(match: re.Match[str]) -> str:
    decoded = html.unescape(match.group())
    # html.unescape leaves what it does not know, and gives U+FFFD for numbers that are no character.
    return "" if decoded == "\ufffd" else decoded.replace("\xa0", " ")


# What counters, share buttons and advertisements of Chinese sites leave: statements, never prose.
_BEGINNINGS = (
    r"var\s+(?:_|cpro|google|s_|bd)\w*\s*=",
    r"(?:window|document|location)\.\w+",
    r"_(?:hmt|gaq)\.push",
    r"\(adsbygoogle\b",
    r"google_ad_\w+\s*=",
    r"BAIDU_CLB_",
    r"\$\((?:document|function)\b",
    r"[!;]?\(function\s*\(",
    r"with\s*\(document\)",
    r"\}\s*\)\s*\(",
    r"@import\s+url",
    r"[.#]?[\w-]++(?:[ ,>.#]++[\w-]++)*+[ \t]*+\{[^{}:\n]*+:[^{}\n]*+\}[ \t\u3000]*+$",
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
