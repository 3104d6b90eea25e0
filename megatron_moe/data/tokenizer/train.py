"""Training a SentencePiece model in a process of its own, and proof from its log that it took every sentence."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

import megatron_moe
from megatron_moe.config.base import UserError
from megatron_moe.data.tokenizer import symbols
from megatron_moe.data.tokenizer.sentences import MAX_SENTENCE_BYTES
from megatron_moe.data.tokenizer.symbols import Symbols

# Characters with a piece of their own however rare they are in the sample: printable ASCII, and the
# full-width punctuation which a low coverage would leave to bytes. U+2581 stands for the space inside
# SentencePiece; without a piece of its own a space would go through byte fallback and come back as U+2581.
REQUIRED = "\u2581\t\u3000" + "".join(map(chr, range(0x21, 0x7F))) + "。，、；：？！“”‘’（）《》【】「」…—·～％"
# The least that SentencePiece takes.
MIN_COVERAGE = 0.98
_LOADED = re.compile(r"Loaded all (\d+) sentences")
_STEP = re.compile(r"\bmerges=(\d+) ")
_ALPHABET = re.compile(r"Alphabet size=(\d+)")
_TROUBLE = ("too long sentences", "Reserved chars are found", "Found null character", "invalid utf8", "Skipped")
_LOG_LINES_KEPT = 20


@dataclass(frozen=True)
class TrainOptions:
    """What decides the model beside the sentences.

    Attributes:
        vocab_size: pieces of the model, all symbols and bytes among them.
        character_coverage: share of the characters with a piece of their own.
        model_type: `bpe` or `unigram`.
        split_by_unicode_script: never merge Han with punctuation, kana or letters.
        symbols: special tokens.
    """

    vocab_size: int
    character_coverage: float
    model_type: str = "bpe"
    split_by_unicode_script: bool = False
    symbols: Symbols = field(default_factory=Symbols)

    def for_sentencepiece(self) -> dict[str, Any]:
        """The arguments of SentencePiece's trainer."""
        return {
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "character_coverage": self.character_coverage,
            "required_chars": REQUIRED,
            "normalization_rule_name": "identity",
            "byte_fallback": True,
            "split_digits": True,
            "split_by_unicode_script": self.split_by_unicode_script,
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "allow_whitespace_only_pieces": True,
            "control_symbols": list(self.symbols.control),
            "user_defined_symbols": ["\n", *self.symbols.user],
            "unk_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "pad_id": 3,
            "unk_piece": symbols.UNKNOWN,
            "bos_piece": symbols.BEGIN,
            "eos_piece": symbols.END,
            "pad_piece": symbols.PAD,
            "max_sentence_length": MAX_SENTENCE_BYTES,
            # Releases before 0.2.2 count pairs in 32 bits without it; later ones always use 64 and say so in the log.
            "train_extremely_large_corpus": True,
            # Stored in the model: a fixed number keeps the file the same on every machine.
            "num_threads": 16,
            "minloglevel": 0,
        }


@dataclass(frozen=True)
class Trained:
    """What the trainer says of itself.

    Attributes:
        sentences: sentences it took, all that it was given.
        peak_bytes: the most memory its process held.
    """

    sentences: int
    peak_bytes: int


def train_model(
    sentences: Path, count: int, model: Path, options: TrainOptions, progress: "tqdm[Any] | None" = None
) -> Trained:
    """Train on a file with a sentence a line; the same file and options give the same model.

    Args:
        sentences: the file; its name is stored in the model, its folder is not.
        count: lines in it.
        model: the file to write.
        options: of the model.
        progress: a bar of learned pieces, moved by what the log says.

    Raises:
        UserError: the vocabulary does not fit the text, or the trainer did not take every sentence.
    """
    request = {"input": sentences.name, "model": str(model.resolve()), "options": options.for_sentencepiece()}
    command = [sys.executable, "-m", "megatron_moe.data.tokenizer.train_process", json.dumps(request)]
    root = str(Path(megatron_moe.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        cwd=sentences.parent,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    log = _Log(progress, options.vocab_size - options.symbols.count)
    try:
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            log.take(line.decode("utf-8", "replace"))
        answer = process.stdout.read()
    finally:
        process.kill()
        code = process.wait()
    if not answer:
        reason = "not enough memory, or killed" if code == -9 else " | ".join(log.last)[-500:] or "no message"
        raise UserError(f"the trainer's process ended with code {code}: {reason}; fewer --input-sentences need less")
    outcome = json.loads(answer)
    if "error" in outcome:
        raise UserError(explain(outcome["error"], options))
    if log.trouble or log.loaded != count:
        found = "; ".join(log.trouble) or "no word of a skipped one"
        raise UserError(f"SentencePiece took {log.loaded} of {count} sentences ({found}); no sentence may be lost")
    return Trained(sentences=count, peak_bytes=outcome["peak_bytes"])


class _Log:
    """What matters in the lines that SentencePiece writes while it trains.

    Args:
        progress: a bar to move.
        learned: pieces to be learned, single characters among them.
    """

    def __init__(self, progress: "tqdm[Any] | None", learned: int) -> None:
        self._progress = progress
        self._learned = learned
        self.loaded: int | None = None
        self.trouble: list[str] = []
        self.last: list[str] = []

    def take(self, line: str) -> None:
        """Read one line."""
        message = line.rstrip().partition("] ")[2] or line.rstrip()
        step = _STEP.search(message)
        if step:
            if self._progress is not None:
                self._progress.update(int(step[1]) - self._progress.n)
            return
        alphabet = _ALPHABET.search(message)
        if alphabet and self._progress is not None:
            # Single characters need no merge.
            self._progress.reset(max(0, self._learned - int(alphabet[1])))
        self.last = [*self.last, message][-_LOG_LINES_KEPT:]
        loaded = _LOADED.search(message)
        if loaded:
            self.loaded = int(loaded[1])
        if len(self.trouble) < 3 and any(word in message for word in _TROUBLE):
            self.trouble.append(message[:100])


def explain(message: str, options: TrainOptions) -> str:
    """What an error of SentencePiece means for the flags."""
    size = options.vocab_size
    largest = re.search(r"set it to a value <= (\d+)", message)
    if largest:
        return f"--vocab-size {size}: this text fills at most {largest[1]} pieces; give that or more text"
    smallest = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message)
    if smallest:
        hint = " or a lower --character-coverage" if options.character_coverage > MIN_COVERAGE else ""
        return (
            f"--vocab-size {size}: at least {smallest[2]} are needed for the single characters of this "
            f"text at coverage {options.character_coverage:.4f}; give that many{hint}"
        )
    return f"--vocab-size {size}: SentencePiece cannot train on this text: {' '.join(message.split())}"
