"""The trainer's lines: nothing of a document is lost but what stands between them."""

from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.data.tokenizer.sentences import MAX_SENTENCE_BYTES, cut_sentences, trainer_lines


@given(st.text(alphabet="好a。！\U0001f600", max_size=200), st.integers(8, 40))
def test_cutting_keeps_every_character_and_the_limit(line: str, limit: int) -> None:
    parts = list(cut_sentences(line, limit))
    assert "".join(parts) == line
    assert all(len(part.encode()) <= limit for part in parts)


@given(st.text(alphabet="好a。 \n\0\u2585\x0c\u2028", max_size=60))
def test_only_spaces_and_line_ends_are_left_out(text: str) -> None:
    lines, cut = trainer_lines(text)
    assert cut == 0
    assert all(line.strip() for line in lines)
    dropped = {ord(mark): None for mark in "\n\0\u2585 \x0c\u2028"}
    assert "".join(lines).translate(dropped) == text.translate(dropped)
    assert not any(mark in line for line in lines for mark in "\n\0\u2585")


def test_long_lines_are_cut_after_a_full_stop() -> None:
    sentence = "这是一个句子。"
    lines, cut = trainer_lines(sentence * 3000 + "\n短\n" + "无" * 6000)
    assert cut == 2
    assert all(len(line.encode()) <= MAX_SENTENCE_BYTES for line in lines)
    assert all(line.endswith("。") for line in lines if line.startswith("这"))
    assert "".join(lines) == sentence * 3000 + "短" + "无" * 6000
    assert lines.count("短") == 1
