"""A page of docs/ and its Chinese twin."""

import re
from collections.abc import Sequence
from pathlib import Path

from tests.test_readme import blocks


def assert_twins(english: Path, chinese: Path, languages: Sequence[str]) -> None:
    """The same code blocks, flags and numbers, and as many headings, table rows and list items."""
    for language in languages:
        assert blocks(english, language) == blocks(chinese, language)
    texts = [path.read_text(encoding="utf-8") for path in (english, chinese)]
    for pattern in (r"^#+ ", r"^\|", r"^- "):
        found = [len(re.findall(pattern, text, re.MULTILINE)) for text in texts]
        assert found[0] == found[1], pattern
    for pattern in (r"--[a-z][a-z0-9-]+", r"\d[\d,]*\.\d+|\d{1,3}(?:,\d{3})+"):
        named = [set(re.findall(pattern, text)) for text in texts]
        assert named[0] == named[1], pattern
