"""The trainer's process: it must take every sentence, die with its parent, and explain itself in one line."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer import train
from megatron_moe.data.tokenizer.load import SentencePieceTokenizer
from megatron_moe.data.tokenizer.sentences import trainer_lines
from megatron_moe.data.tokenizer.symbols import Symbols
from megatron_moe.data.tokenizer.train import TrainOptions, explain, train_model
from tests.data.chinese_text import documents

OPTIONS = TrainOptions(vocab_size=860, character_coverage=0.98)


def write(folder: Path, lines: list[str]) -> Path:
    path = folder / "sample.txt"
    path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))
    return path


@pytest.fixture
def lines() -> list[str]:
    return [line for text in documents(200) for line in text.split("\n")]


@pytest.mark.parametrize("skipped", ["长" * 6000, "有\u2585的行", "有\0的行"])
def test_a_sentence_that_the_trainer_skips_is_an_error(tmp_path: Path, lines: list[str], skipped: str) -> None:
    given_lines = [*lines, skipped]
    with pytest.raises(UserError, match="no sentence may be lost"):
        train_model(write(tmp_path, given_lines), len(given_lines), tmp_path / "m.model", OPTIONS)


def test_none_of_our_lines_is_skipped(tmp_path: Path, lines: list[str]) -> None:
    """Characters of all of Unicode, spelled symbols, and lines around the limit, as `trainer_lines` gives them."""
    points = [*range(0x100), *range(0x2000, 0x2100), *range(0x2580, 0x25A0), *range(0xFFF0, 0x10000)]
    points += [point for point in range(0x100, 0x110000, 251) if not 0xD800 <= point < 0xE000]
    odd = ["".join(map(chr, points[at : at + 997])) for at in range(0, len(points), 997)]
    odd += [
        "<eod><s><0x41>",
        "一" * 5461,
        "一" * 5461 + "a",
        "一" * 5462,
        "\r",
        "\ufeffa\r",
        "有\u2585的",
        "a" * 16384 + "b",
        " a ",
    ]
    # The rare ones must stay rare, or they would all want pieces of their own.
    given_lines = [*lines * 30, *(line for text in odd for line in trainer_lines(text)[0])]
    sentences = write(tmp_path, given_lines)
    trained = train_model(sentences, len(given_lines), tmp_path / "m.model", OPTIONS)
    assert trained.sentences == len(given_lines)
    assert trained.peak_bytes > 10_000_000
    tokenizer = SentencePieceTokenizer(tmp_path / "m.model")
    for text in odd:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=1000)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text("好人。\n\t\r \u2581\u2585\0a<>eod|us1２"))
def test_any_text_comes_back(tokenizer_model: Path, text: str) -> None:
    tokenizer = SentencePieceTokenizer(tokenizer_model)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(32))


def test_text_that_spells_symbols_is_learned_as_text(tmp_path: Path, lines: list[str]) -> None:
    spelled = "<eod> <s> <0x41> <|user|> <|reserved_0|>"
    given_lines = [*lines, *[spelled] * 500]
    options = TrainOptions(vocab_size=900, character_coverage=0.98, symbols=Symbols(user=("①,\"'", "<|tool|>")))
    train_model(write(tmp_path, given_lines), len(given_lines), tmp_path / "m.model", options)
    tokenizer = SentencePieceTokenizer(tmp_path / "m.model")
    ids = tokenizer.encode(spelled + "①,\"'<|tool|>")
    assert min(ids) == 33
    assert [tokenizer.pieces[index] for index in (32, 33, 34, 35)] == ["\n", "①,\"'", "<|tool|>", "<0x00>"]
    assert ids[-2:] == [33, 34]


def test_digits_stand_alone(tmp_path: Path, lines: list[str]) -> None:
    given_lines = [*lines, *["20260718年 ２０２６"] * 500]
    train_model(write(tmp_path, given_lines), len(given_lines), tmp_path / "m.model", OPTIONS)
    tokenizer = SentencePieceTokenizer(tmp_path / "m.model")
    assert len(tokenizer.encode("20260718")) == 8
    assert len(tokenizer.encode("２０２６")) == 4


def test_the_bar_counts_merges_to_the_end(tmp_path: Path, lines: list[str]) -> None:
    with tqdm(total=1, file=io.StringIO()) as bar:
        train_model(write(tmp_path, lines), len(lines), tmp_path / "m.model", OPTIONS, bar)
        pieces = SentencePieceTokenizer(tmp_path / "m.model").pieces[289:]
        merged = sum(len(piece) > 1 for piece in pieces)
        assert bar.total == merged > 100
        # The log speaks of every hundredth.
        assert bar.n == merged // 100 * 100


def test_other_failures_of_the_trainer_are_one_line() -> None:
    message = explain("INTERNAL: src/x.cc(1) [a]\n something", OPTIONS)
    assert message == "--vocab-size 860: SentencePiece cannot train on this text: INTERNAL: src/x.cc(1) [a] something"


def test_a_killed_trainer_is_one_line(tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen

    def start_and_kill(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
        process = start(*arguments, **options)  # type: ignore[call-overload]
        process.kill()
        return process  # type: ignore[no-any-return]

    monkeypatch.setattr(train.subprocess, "Popen", start_and_kill)
    with pytest.raises(UserError, match=r"ended with code -9: not enough memory, or killed; fewer --input-sentences"):
        train_model(write(tmp_path, lines), len(lines), tmp_path / "m.model", OPTIONS)


PARENT = """
import sys
from pathlib import Path
from megatron_moe.data.tokenizer.train import TrainOptions, train_model

train_model(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), TrainOptions(8000, 0.9995))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends the process")
def test_the_trainer_ends_with_the_tool(tmp_path: Path) -> None:
    texts = ["".join(chr(0x4E00 + (place * step) % 3000) for place in range(500)) for step in range(1, 6000)]
    command = [sys.executable, "-c", PARENT, str(write(tmp_path, texts)), str(len(texts)), str(tmp_path / "m.model")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    parent = subprocess.Popen(command, env=environment)
    children: list[psutil.Process] = []
    while not (tmp_path / "m.model").exists():
        assert parent.poll() is None
        children = psutil.Process(parent.pid).children()
        time.sleep(0.01)
    (child,) = children
    # Stopped, so that it can neither finish by itself nor fail to write to its parent.
    child.suspend()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        _, left = psutil.wait_procs(children, timeout=20)
        assert not [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
