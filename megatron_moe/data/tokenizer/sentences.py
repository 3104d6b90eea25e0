"""What the trainer of SentencePiece is given: lines that it takes whole, so that no text is skipped."""

import re
from collections.abc import Iterator

from megatron_moe.data.tokenizer.symbols import UNKNOWN_MARK

# SentencePiece skips longer lines with only a warning, so longer ones are cut before it sees them. Its BPE trainer
# cannot hold words of more than 65,535 characters at all.
MAX_SENTENCE_BYTES = 16384
# Lines of so many characters need no look at their bytes: a character has at most 4.
_SURELY_SHORT = MAX_SENTENCE_BYTES // 4
_AFTER_SENTENCE = re.compile(r"(?<=[。！？!?；;])")


def trainer_lines(text: str) -> tuple[list[str], int]:
    """The lines of a document as the trainer takes them.

    Lines end only at newlines, which are a piece of their own: a form feed or U+2028 stays inside its line. NUL,
    which the trainer cannot take, and U+2585, for which it skips the whole line, end a line too; both are spelled
    in bytes in the end. Lines of nothing but space are left out.

    Returns:
        The lines, and how many lines of the text were over the limit and had to be cut.
    """
    if "\0" in text or UNKNOWN_MARK in text:
        text = text.replace("\0", "\n").replace(UNKNOWN_MARK, "\n")
    if len(text) <= _SURELY_SHORT:
        return [line for line in text.split("\n") if line and not line.isspace()], 0
    lines: list[str] = []
    cut = 0
    for line in text.split("\n"):
        if not line or line.isspace():
            continue
        if len(line) <= _SURELY_SHORT:
            lines.append(line)
            continue
        parts = list(cut_sentences(line))
        cut += len(parts) > 1
        lines += parts
    return lines, cut


def cut_sentences(line: str, max_bytes: int = MAX_SENTENCE_BYTES) -> Iterator[str]:
    """A line as it is or, over `max_bytes` of UTF-8, in parts: cut after a full stop, else anywhere."""
    if len(line.encode("utf-8")) <= max_bytes:
        yield line
        return
    part, size = "", 0
    for sentence in _AFTER_SENTENCE.split(line):
        for piece in _cut_hard(sentence, max_bytes):
            length = len(piece.encode("utf-8"))
            if size + length > max_bytes:
                yield part
                part, size = "", 0
            part, size = part + piece, size + length
    if part:
        yield part


def _cut_hard(sentence: str, max_bytes: int) -> Iterator[str]:
    step = max_bytes // 4  # a character is at most 4 bytes
    if len(sentence.encode("utf-8")) <= max_bytes:
        yield sentence
        return
    for start in range(0, len(sentence), step):
        yield sentence[start : start + step]
