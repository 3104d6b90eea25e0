"""Sentences end where Chinese ones do, and nothing is lost between them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.data.preprocess.sentences import split_sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("没有句号", ["没有句号"]),
        ("你好。再见！", ["你好。", "再见！"]),
        ("他说：“走吧！”然后走了。", ["他说：“走吧！”", "然后走了。"]),
        ("真的？！是的……好。", ["真的？！", "是的……好。"]),
        ("第一段\n\n第二段。\n第三段", ["第一段\n\n", "第二段。\n", "第三段"]),
        ("\n开头", ["\n开头"]),
        ("。。\n", ["。。\n"]),
        ('Yes!"No"', ["Yes!", '"No"']),
        ("3.14 and a.b", ["3.14 and a.b"]),
    ],
)
def test_examples(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@given(st.text("好。！？!?\n”』)“ a") | st.text())
def test_joined_they_are_the_text(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentences)
