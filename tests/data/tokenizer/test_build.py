"""Building a tokenizer: same input, same files; nothing skipped; killed builds go on; bad input in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from megatron_moe.config.base import UserError
from megatron_moe.data.files import locked_file
from megatron_moe.data.tokenizer.build import build_tokenizer, train_tokenizer
from megatron_moe.data.tokenizer.load import SentencePieceTokenizer
from megatron_moe.data.tokenizer.options import BuildOptions, choose_coverage
from megatron_moe.data.tokenizer.sample import SampleOptions
from megatron_moe.data.tokenizer.symbols import Symbols
from tests.data.chinese_text import documents, write_jsonl

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "build_tokenizer.py"
WRITTEN = {
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "report.json",
    "report.html",
    "timings.json",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "timings.json"}


def options(**changes: Any) -> BuildOptions:
    return BuildOptions(**{"vocab_size": 860, **changes})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "a.jsonl", documents(400))


@pytest.fixture(scope="module")
def built(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "tokenizer"
    build_tokenizer([corpus], folder, options())
    return folder


def test_all_files_are_there_and_nothing_else(built: Path) -> None:
    assert {path.name for path in built.iterdir()} == WRITTEN


def test_jsonl_and_plain_text_give_the_same_model(tmp_path: Path) -> None:
    texts = [text.replace("\n", "") for text in documents(100)]
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    plain = tmp_path / "a.txt"
    plain.write_text("\n".join(texts), encoding="utf-8")
    for name, source in (("one", corpus), ("plain", plain)):
        train_tokenizer([source], tmp_path / f"{name}.model", 860)
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "plain.model").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_symbols_have_their_places(built: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(built / "tokenizer.model"))
    pieces = [model.id_to_piece(index) for index in range(860)]
    assert pieces[:7] == ["<unk>", "<s>", "</s>", "<pad>", "<eod>", "<sep>", "<mask>"]
    assert pieces[7:12] == ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|reserved_0|>"]
    assert pieces[31:34] == ["<|reserved_20|>", "\n", "<0x00>"]
    report = json.loads((built / "report.json").read_bytes())
    assert [pieces[index] for index in report["special_tokens"].values()] == list(report["special_tokens"])
    assert model.encode("\n\n") == [32, 32]
    # Punctuation and space have pieces although the corpus holds neither 《 nor a space.
    assert all(len(model.encode(character)) == 1 for character in "，。《》“ aZ7")


def test_a_line_longer_than_the_trainer_takes_is_cut_not_skipped(tmp_path: Path) -> None:
    long_line = "".join(documents(300)).replace("\n", "")
    assert len(long_line.encode()) > 50_000
    corpus = write_jsonl(tmp_path / "a.jsonl", [long_line, "含有\u2585的行，\0和更多。" * 50])
    report = build_tokenizer([corpus], tmp_path / "long", options(sample=SampleOptions(heldout_every=0)))
    assert report["read"]["documents"] == 2
    assert report["read"]["cut_lines"] == 1
    assert report["skipped_sentences"] == 0
    pieces = SentencePieceTokenizer(tmp_path / "long" / "tokenizer.model").pieces
    assert "工程师" in pieces
    assert "更" in pieces


def test_small_vocabularies_get_a_lower_coverage() -> None:
    counts = np.array([1 + 200_000 // (rank + 1) for rank in range(6000)])
    symbols = Symbols().count
    assert choose_coverage(counts, 50_000, symbols) == 0.9995
    assert 0.98 <= choose_coverage(counts, 8000, symbols) < choose_coverage(counts, 12_000, symbols) < 0.9995
    assert choose_coverage(counts, 1000, symbols) == 0.98


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, "--vocab-size 300: must be at least"),
        ({"vocab_size": 30_000}, "--vocab-size 30000: this text fills at most"),
        ({"character_coverage": 0.5}, "--character-coverage 0.5: must be in"),
        ({"model_type": "word"}, "--model-type word: must be bpe or unigram"),
        ({"sample": SampleOptions(sentences=0)}, "--input-sentences 0: must be at least 1"),
        ({"sample": SampleOptions(heldout_every=1)}, "--heldout-every 1: must be 0"),
    ],
)
def test_options_that_do_not_fit_are_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", documents(20))
    with pytest.raises(UserError, match=rf"^{message}") as caught:
        build_tokenizer([corpus], tmp_path / "t", options(**changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "t" / "tokenizer.model").exists()


def test_text_with_more_characters_than_pieces_is_refused(tmp_path: Path) -> None:
    every_character_once = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    corpus = write_jsonl(tmp_path / "a.jsonl", [every_character_once])
    with pytest.raises(UserError, match=r"--vocab-size 1000: at least \d{4} are needed"):
        train_tokenizer([corpus], tmp_path / "t.model", 1000)


def test_no_text_is_an_error(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", ["", " \n "])
    with pytest.raises(UserError, match="no text in it"):
        train_tokenizer([corpus], tmp_path / "t.model", 1000)


def test_a_finished_build_is_not_done_again(built: Path, corpus: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    report = build_tokenizer([corpus], built, options())
    assert report == json.loads((built / "report.json").read_bytes())
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before
    with pytest.raises(UserError, match="holds a tokenizer of other text or options"):
        build_tokenizer([corpus], built, options(vocab_size=861))


def test_two_builds_in_one_folder_are_refused(tmp_path: Path, corpus: Path) -> None:
    output = tmp_path / "out"
    busy = pytest.raises(UserError, match=r"--output .*out: another process is working there")
    with locked_file(output / ".work" / "lock", "", ""), busy:
        build_tokenizer([corpus], output, options())


def test_a_foreign_model_is_not_overwritten(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds a tokenizer\.model without a report"):
        build_tokenizer([corpus], tmp_path, options())
    assert (tmp_path / "tokenizer.model").read_bytes() == b"mine"


@pytest.mark.parametrize("moment", ["sample.txt", "tokenizer.model", "report.html"])
def test_a_killed_build_leaves_nothing_half_done_and_goes_on(
    moment: str, built: Path, corpus: Path, tmp_path: Path
) -> None:
    """Killed as soon as a file of the working folder stands there, and no sooner."""
    output = tmp_path / "tokenizer"
    command = [sys.executable, str(TOOL), "--input", str(corpus), "--output", str(output), "--vocab-size", "860"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (output / ".work" / moment).exists() and process.poll() is None:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (output / "report.json").exists():
        # Too late to catch it between two renames: either none of the files is there or they are whole.
        for path in output.glob("tokenizer*"):
            assert path.read_bytes() == (built / path.name).read_bytes()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert contents(output) == contents(built)


def test_files_get_their_names_whole(
    built: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two of the last renames: what has a name is whole, and the next start ends the work."""
    output = tmp_path / "tokenizer"
    replace = Path.replace

    def stop_at_the_last(self: Path, target: Path) -> Path:
        if target == output / "report.json":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop_at_the_last)
        with pytest.raises(KeyboardInterrupt):
            build_tokenizer([corpus], output, options())
    there = {path.name for path in output.iterdir()}
    assert there == WRITTEN - {"report.json"} | {".work"}
    build_tokenizer([corpus], output, options())
    assert contents(output) == contents(built)


def test_the_sample_of_other_text_is_not_used(
    built: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", documents(400, seed=8))
    output = tmp_path / "tokenizer"
    with monkeypatch.context() as patched:
        patched.setattr("megatron_moe.data.tokenizer.build.train_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_tokenizer([other], output, options())
    assert (output / ".work" / "sample.json").exists()
    build_tokenizer([corpus], output, options())
    assert contents(output) == contents(built)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_number_of_workers_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_moe.data.tokenizer.reading._WORTH_A_PROCESS", 1)
    for number in range(3):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", documents(100, seed=number))
    asked = options(sample=SampleOptions(sentences=300, heldout_every=10))
    for workers in (1, 2):
        build_tokenizer([tmp_path / "in"], tmp_path / str(workers), asked, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    report = json.loads((tmp_path / "1" / "report.json").read_bytes())
    assert report["read"]["sampled_sentences"] == 300 < report["read"]["sentences"]
