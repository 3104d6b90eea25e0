"""The exported tokenizer gives SentencePiece's ids for every text, loads without its packages, and renders chats."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe.config.base import UserError
from megatron_moe.config.data import DataConfig
from megatron_moe.data.tokenizer.build import build_tokenizer
from megatron_moe.data.tokenizer.export import hugging_face_files, merges
from megatron_moe.data.tokenizer.load import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_saved_tokenizer,
    load_tokenizer,
)
from megatron_moe.data.tokenizer.model_file import Piece, PieceType
from megatron_moe.data.tokenizer.options import BuildOptions
from megatron_moe.data.tokenizer.symbols import Symbols
from tests.data.chinese_text import documents, write_jsonl

USER_SYMBOLS = ("<|tool|>", "<|tool|>>", "①,\"'", "ab")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with user symbols, learned from text with runs, digits, letters and mixed spaces."""
    here = tmp_path_factory.mktemp("export")
    mixed = [
        "——" * 5 + " if x == 10:\n        return 'aaa'  # 注释\t制表",
        "ababab abcabc aaaaaaa ======= ……………… 哈哈哈哈 \r\n　　全角，ＡＢＣ１２３",
        "e\u0301te\u0301 <|user|> <s> <0x41> ①②③ ab①,\"'ab",
    ]
    corpus = write_jsonl(here / "a.jsonl", [*documents(150), *mixed * 30])
    options = BuildOptions(vocab_size=1100, symbols=Symbols(user=USER_SYMBOLS))
    build_tokenizer([corpus], here / "tokenizer", options)
    return here / "tokenizer"


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return load_tokenizer(DataConfig(tokenizer_model=str(folder / "tokenizer.model")))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Tokenizer:
    return load_tokenizer(DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder)))


def check(ours: Tokenizer, theirs: Tokenizer, text: str) -> None:
    ids = ours.encode(text)
    assert theirs.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids) == text
    assert not set(ids) & set(range(32))


# fmt: off
PIECES = st.sampled_from([
    "——", "—", "aa", "a", "ab", "ba", "哈哈", "哈", " ", "  ", "1", "10", "=", "，", "。", "𠮷", "e\u0301", "图书馆",
    "\t", "\n", "\n\n", "\r\n", "\u2581", "\u2585", "\0", "\ue000", "\ufffd", "\ufeff", "\x7f", "\x85", "\u3000",
    "<|user|>", "<s>", "<unk>", "<eod>", "<0x41>", "<|tool|>", "<|tool|>>", "①,\"'", "👨\u200d👩", "天气很好，",
])
# fmt: on


@settings(deadline=None, max_examples=1000)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80) | st.lists(PIECES, max_size=30).map("".join))
def test_any_text_has_the_same_ids(ours: Tokenizer, theirs: Tokenizer, text: str) -> None:
    check(ours, theirs, text)


@settings(deadline=None, max_examples=500)
@given(data=st.data())
def test_any_pieces_in_a_row_have_the_same_ids(ours: Tokenizer, theirs: Tokenizer, data: st.DataObject) -> None:
    learned = [piece.replace("\u2581", " ") for piece in ours.pieces[292:]]
    check(ours, theirs, "".join(data.draw(st.lists(st.sampled_from(learned), max_size=25))))


def test_real_text_has_the_same_ids(ours: Tokenizer, theirs: Tokenizer) -> None:
    for text in topics.values():
        check(ours, theirs, text)


def test_every_character_has_the_same_ids(ours: Tokenizer, theirs: Tokenizer) -> None:
    """Each code point that Unicode allows in text, alone: a thousand of them in a line."""
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    points = points[:0x3000] + points[0x3000::37]
    for start in range(0, len(points), 1000):
        check(ours, theirs, "".join(map(chr, points[start : start + 1000])))


def test_what_is_no_text_is_named(ours: Tokenizer, theirs: Tokenizer) -> None:
    for tokenizer in (ours, theirs):
        for text in ("a\ud800", "\u2581a\udfff"):
            for encode in (tokenizer.encode, lambda text, t=tokenizer: t.encode_batch(["a", text])):
                with pytest.raises(UserError, match="half of a surrogate pair at character"):
                    encode(text)


@pytest.mark.slow
def test_100_000_lines_have_the_same_ids(ours: Tokenizer, theirs: Tokenizer) -> None:
    """Words of jieba's dictionary between lines of English, code and made-up Chinese."""
    jieba = pytest.importorskip("jieba")
    words = [line.split(" ")[0] for line in jieba.get_dict_file().read().decode("utf-8").splitlines()]
    source = [line for text in [*topics.values(), *documents(400)] for line in text.split("\n")]
    random_ = random.Random(0)
    for start in range(0, 100_000, 1000):
        lines = []
        for _ in range(1000):
            one, other = random_.choice(source), random_.choice(source)
            middle = "".join(random_.choices(words, k=random_.randrange(20)))
            lines.append(one[random_.randrange(len(one) + 1) :] + middle + other[: random_.randrange(len(other) + 1)])
        ids, lengths = ours.encode_batch(lines)
        same_ids, same_lengths = theirs.encode_batch(lines)
        assert lengths.tolist() == same_lengths.tolist(), start
        assert ids.tolist() == same_ids.tolist(), start


def test_the_left_one_of_two_overlapping_joins_wins(tmp_path: Path) -> None:
    """`aba` can be cut as ab a and as a ba; in `ab a ba` SentencePiece joins the left two."""
    normal = ["ab", "ba", "aba", "a", "b"]
    pieces = [Piece(text, -float(rank), PieceType.NORMAL) for rank, text in enumerate(normal)]
    assert merges(pieces) == [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba")]
    # The powers of one string: the longer left part first.
    normal = ["xx", "xxx", "x"]
    pieces = [Piece(text, -float(rank), PieceType.NORMAL) for rank, text in enumerate(normal)]
    assert merges(pieces) == [("x", "x"), ("xx", "x"), ("x", "xx")]


def test_pieces_are_not_joined_across_a_newline_or_into_symbols() -> None:
    kinds = {"\n": PieceType.USER_DEFINED, "<s>": PieceType.CONTROL, "<0x41>": PieceType.BYTE}
    texts = ["a\n", "<s>", "<0x41>", "aa", "a", "\n", "<", "s>", "\u2581a", "\u2581"]
    pieces = [Piece(text, -float(rank), kinds.get(text, PieceType.NORMAL)) for rank, text in enumerate(texts)]
    assert merges(pieces) == [("a", "a"), (" ", "a")]


ALONE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("sentencepiece", "tiktoken", "torch") or name.startswith("google")
        return None if hidden else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in ("sentencepiece", "google.protobuf"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(name + " is still there")
import json
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = [{"role": "system", "content": "简短。"}, {"role": "user", "content": " 你好\\n吗"}]
encoded = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
print(json.dumps({
    "ids": tokenizer.encode(sys.argv[2], add_special_tokens=False),
    "plain": tokenizer.encode(sys.argv[2]),
    "text": tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False),
    "chat": encoded,
    "back": tokenizer.decode(encoded, skip_special_tokens=True),
    "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id],
    "padded": tokenizer(["图书馆的书", "a"], padding=True)["attention_mask"][1],
    "size": len(tokenizer),
    "wrong": [name for name in sys.modules if name.split(".")[0] == "sentencepiece"],
}))
"""


def run_alone(folder: Path, text: str) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder), text], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_transformers_alone_reads_it_and_renders_chats(folder: Path, ours: Tokenizer) -> None:
    text = "第一段：“你好”，２０２６年。\n\n  第二段\t㐂𠮷\u2581"
    answer = run_alone(folder, text)
    assert answer["wrong"] == []
    assert answer["ids"] == answer["plain"] == ours.encode(text)
    assert answer["size"] == ours.vocab_size
    assert answer["special"] == [1, ours.eod, 3, 0]
    assert answer["text"] == "<|system|>简短。<|end|><|user|> 你好\n吗<|end|><|assistant|>"
    assert answer["chat"] == [7, *ours.encode("简短。"), 10, 8, *ours.encode(" 你好\n吗"), 10, 9]
    assert answer["back"] == "简短。 你好\n吗"
    # For generation the text stands at the right end.
    assert answer["padded"][0] == 0
    assert answer["padded"][-1] == 1


def test_an_unknown_role_is_an_error(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with pytest.raises(Exception, match="role tool: must be system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_a_checkpoint_keeps_the_exported_tokenizer(theirs: Tokenizer, tmp_path: Path) -> None:
    assert isinstance(theirs, HuggingFaceTokenizer)
    theirs.save_to(tmp_path)
    again = load_saved_tokenizer(tmp_path)
    assert again.fingerprint == theirs.fingerprint
    assert again.eod == theirs.eod == 4
    for text in ("第一段。\n  二 ① <|user|><|tool|>", "\u2581 a", "aaaaa————"):
        assert again.encode(text) == theirs.encode(text)
        assert again.decode(again.encode(text)) == text


def train(path: Path, **changes: Any) -> bytes:
    settings_ = {
        "vocab_size": 500,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        **changes,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents(50)), model_prefix=str(path / "m"), **settings_
    )
    return (path / "m.model").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "a unigram model has no exact counterpart"),
        ({"byte_fallback": False}, "it has no byte fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"it normalises text \(nmt_nfkc\)"),
        ({"add_dummy_prefix": True}, "it changes spaces"),
        ({"remove_extra_whitespaces": True}, "it changes spaces"),
        ({"treat_whitespace_as_suffix": True}, "it changes spaces"),
        ({}, "lacks the special tokens <eod>, <mask>, <pad>, <sep>"),
    ],
)
def test_models_without_an_exact_counterpart_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    content = train(tmp_path, **changes)
    with pytest.raises(UserError, match=rf"^the model: .*{message}") as caught:
        hugging_face_files(content, "the model")
    assert "\n" not in str(caught.value)


def test_a_unigram_model_is_lossless_and_has_no_export(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", documents(200))
    report = build_tokenizer([corpus], tmp_path / "t", BuildOptions(vocab_size=700, model_type="unigram"))
    assert report["files"] == ["tokenizer.model"]
    assert not (tmp_path / "t" / "tokenizer.json").exists()
    tokenizer = SentencePieceTokenizer(tmp_path / "t" / "tokenizer.model")
    for text in ("  前后 \n\n㐂𠮷\u2581\0\u2585<eod> ", "今天，天气 很好！"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
