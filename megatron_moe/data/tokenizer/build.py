"""Training a SentencePiece BPE model that gives back any Chinese text exactly as it was."""

import io
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_moe.config.base import UserError
from megatron_moe.data.documents import check_input_files, parse_document
from megatron_moe.data.files import iterate_lines, open_stream

END_OF_DOCUMENT = "<eod>"
# Control symbols, not user-defined ones: text that spells "<eod>" must not become the end of a document.
_CONTROL_SYMBOLS = (END_OF_DOCUMENT, "<sep>", "<mask>")
_BYTES = 256
_RESERVED = 4 + len(_CONTROL_SYMBOLS) + 1 + _BYTES
# Characters with a piece of their own however rare they are in the sample: printable ASCII, and the
# full-width punctuation which a low coverage would leave to bytes. U+2581 stands for the space inside
# SentencePiece; without a piece of its own a space would go through byte fallback and come back as U+2581.
_REQUIRED = "\u2581\t\u3000" + "".join(map(chr, range(0x21, 0x7F))) + "。，、；：？！“”‘’（）《》【】「」…—·～％"
# The usual value for Chinese, and the least that SentencePiece takes.
_MAX_COVERAGE = 0.9995
_MIN_COVERAGE = 0.98
# SentencePiece skips longer lines with only a warning, so longer ones are cut before it sees them.
_MAX_SENTENCE_BYTES = 16384
_AFTER_SENTENCE = re.compile(r"(?<=[。！？!?；;])")


@dataclass(frozen=True)
class BuildReport:
    """What a training run of the tokenizer read and made.

    Attributes:
        documents: documents read.
        sentences: lines given to the trainer.
        cut_lines: lines over the trainer's limit, which were cut into sentences (nothing is dropped).
        characters: characters in those lines.
        character_coverage: share of them that got pieces of their own; the others are spelled in bytes.
        vocab_size: pieces in the model.
        seconds: how long it took.
    """

    documents: int
    sentences: int
    cut_lines: int
    characters: int
    character_coverage: float
    vocab_size: int
    seconds: float


def build_tokenizer(
    inputs: Sequence[Path],
    output_prefix: Path,
    vocab_size: int,
    *,
    json_key: str = "text",
    character_coverage: float | None = None,
) -> BuildReport:
    """Train a BPE model on text and write `<output_prefix>.model`; the same input gives the same file.

    Args:
        inputs: JSON Lines files (.jsonl, .jsonl.gz), or plain text (.txt, .txt.gz) with a document a line.
        output_prefix: path of the model without `.model`; missing folders are made.
        vocab_size: pieces in the model, 4 + 3 symbols, the newline and 256 bytes among them.
        json_key: which field of a JSON line holds the text.
        character_coverage: share of the characters to give pieces of their own. Default: 0.9995, or less
            (down to 0.98) where single characters would take more than half of the vocabulary and leave no
            room for words.

    Raises:
        UserError: unreadable input, or a vocabulary that this text cannot fill or that is too small for it.
    """
    started = time.monotonic()
    check_input_files(inputs)
    required = _RESERVED + len(_REQUIRED)
    if vocab_size < 2 * required:
        raise UserError(
            f"--vocab-size {vocab_size}: must be at least {2 * required} ({required} pieces are symbols, "
            "bytes and punctuation)"
        )
    if character_coverage is not None and not _MIN_COVERAGE <= character_coverage <= 1:
        raise UserError(f"--character-coverage {character_coverage}: must be in [{_MIN_COVERAGE}, 1]")
    counts: Counter[str] = Counter()
    documents = sentences = cut_lines = 0
    for path in inputs:
        for text in _texts(path, json_key):
            documents += 1
            for line in _lines(text):
                pieces = list(cut_sentences(line))
                cut_lines += len(pieces) > 1
                sentences += len(pieces)
                counts.update(line)
    if not sentences:
        raise UserError(f"--input {inputs[0]}: no text in it to train a tokenizer on")
    coverage = character_coverage or choose_coverage(counts, vocab_size)
    feed = (
        part
        for path in inputs
        for text in _texts(path, json_key)
        for line in _lines(text)
        for part in cut_sentences(line)
    )
    _write_atomically(Path(f"{output_prefix}.model"), _train(feed, vocab_size, coverage))
    return BuildReport(
        documents=documents,
        sentences=sentences,
        cut_lines=cut_lines,
        characters=counts.total(),
        character_coverage=coverage,
        vocab_size=vocab_size,
        seconds=time.monotonic() - started,
    )


def choose_coverage(counts: Counter[str], vocab_size: int) -> float:
    """The character coverage for a vocabulary: 0.9995 unless characters would then fill more than half of it.

    At 8000 pieces 0.9995 spends about 7000 on single characters, so that hardly a word remains. Never below
    0.98, the least that SentencePiece takes.
    """
    budget = max(1, (vocab_size - _RESERVED) // 2)
    covered = sum(count for _, count in counts.most_common(budget))
    return max(_MIN_COVERAGE, min(_MAX_COVERAGE, covered / counts.total()))


def cut_sentences(line: str, max_bytes: int = _MAX_SENTENCE_BYTES) -> Iterator[str]:
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


def _lines(text: str) -> Iterator[str]:
    # Only at newlines, which are a piece of their own: a form feed or U+2028 stays inside its sentence. The
    # trainer cannot take NUL; it is spelled in bytes anyway.
    return (line for line in text.replace("\0", "").split("\n") if line.strip())


def _texts(path: Path, json_key: str) -> Iterator[str]:
    plain = path.name.removesuffix(".gz").endswith(".txt")
    with open_stream(path) as (stream, _):
        for number, line in enumerate(iterate_lines(stream, path), start=1):
            if not plain:
                yield parse_document(line, json_key, path, number)
                continue
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} line {number}: not UTF-8 ({error.reason})") from error


def _train(sentences: Iterator[str], vocab_size: int, coverage: float) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=coverage,
            required_chars=_REQUIRED,
            normalization_rule_name="identity",
            byte_fallback=True,
            split_digits=True,
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            control_symbols=list(_CONTROL_SYMBOLS),
            user_defined_symbols=["\n"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            # Stored in the model: a fixed number keeps the file the same on every machine.
            num_threads=16,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size, coverage)) from error
    return model.getvalue()


def _explain(message: str, vocab_size: int, coverage: float) -> str:
    largest = re.search(r"set it to a value <= (\d+)", message)
    if largest:
        return f"--vocab-size {vocab_size}: this text fills at most {largest[1]} pieces; give that or more text"
    smallest = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message)
    if smallest:
        hint = " or a lower --character-coverage" if coverage > _MIN_COVERAGE else ""
        return (
            f"--vocab-size {vocab_size}: at least {smallest[2]} are needed for the single characters of this "
            f"text at coverage {coverage:.4f}; give that many{hint}"
        )
    return f"--vocab-size {vocab_size}: SentencePiece cannot train on this text: {message}"


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--output-prefix {path.with_suffix('')}: cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
