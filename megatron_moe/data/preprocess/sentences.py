"""Cutting Chinese text into sentences that put together give the text again."""

import re

# A sentence ends with its marks and what closes a quotation or bracket after them, and takes the newlines that follow.
# Straight quotes may as well open the next sentence, so they do not belong to the one before.
_SENTENCE = re.compile(r"\n*[^。！？!?\n]*(?:[。！？!?]+[”’」』）】》〉)]*)?\n*")


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, ended by 。！？!? or a newline; joined they are the text."""
    # The pattern also matches nothing at the end.
    return [sentence for sentence in _SENTENCE.findall(text) if sentence]
