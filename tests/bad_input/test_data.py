"""Token files and tokenizers that are missing, damaged, or belong to something else."""

import shutil
import struct
from collections.abc import Callable
from typing import Any

from tests.bad_input.cases import MODEL, TRAINING, Case, Place, check_refused, cut, on_ranks

SHARED = f"{MODEL} {TRAINING} --data-path {{data}}/train --tokenizer-model {{data}}/bpe.model"


def write(name: str, content: bytes) -> Callable[[Place], Any]:
    return lambda place: (place.data / name).write_bytes(content)


def remove(name: str) -> Callable[[Place], Any]:
    return lambda place: (place.data / name).unlink()


def truncate(name: str, share: float = 0.5) -> Callable[[Place], Any]:
    return lambda place: cut(place.data / name, share)


def copy(source: str, target: str) -> Callable[[Place], Any]:
    return lambda place: shutil.copy(place.data / source, place.data / target)


def overwrite(name: str, position: int, content: bytes) -> Callable[[Place], Any]:
    def damage(place: Place) -> None:
        with (place.data / name).open("r+b") as file:
            file.seek(position)
            file.write(content)

    return damage


CASES = [
    Case(
        "no .bin",
        "",
        "--train-data-path {data}/train: no file {data}/train.bin; write it with tools/preprocess_data.py",
        remove("train.bin"),
    ),
    Case(
        "no .idx",
        "",
        "--train-data-path {data}/train: no file {data}/train.idx; write it with tools/preprocess_data.py",
        remove("train.idx"),
    ),
    Case(
        "cut .bin",
        "",
        "--train-data-path {data}/train: {data}/train.bin holds 4481 bytes but its index announces 8962; it was "
        "cut short or belongs to another index, run tools/preprocess_data.py again",
        truncate("train.bin"),
    ),
    Case(
        "cut .idx",
        "",
        "--train-data-path {data}/train: {data}/train.idx holds 1221 bytes but announces 2442; it was cut short "
        "or damaged, run tools/preprocess_data.py again",
        truncate("train.idx"),
    ),
    Case(
        "header of .idx cut",
        "",
        "--train-data-path {data}/train: {data}/train.idx is not a Megatron index; run tools/preprocess_data.py again",
        truncate("train.idx", 0.005),
    ),
    Case(
        "empty .idx",
        "",
        "--train-data-path {data}/train: {data}/train.idx is not a Megatron index; run tools/preprocess_data.py again",
        write("train.idx", b""),
    ),
    Case(
        "empty .bin",
        "",
        "--train-data-path {data}/train: {data}/train.bin holds 0 bytes but its index announces 8962; it was cut "
        "short or belongs to another index, run tools/preprocess_data.py again",
        write("train.bin", b""),
    ),
    Case(
        "wrong magic",
        "",
        "--train-data-path {data}/train: {data}/train.idx is not a Megatron index; run tools/preprocess_data.py again",
        overwrite("train.idx", 0, b"NOTANIDX"),
    ),
    Case(
        "wrong version",
        "",
        "--train-data-path {data}/train: {data}/train.idx has version 7 and dtype code 8; known: 1, and 1-8",
        overwrite("train.idx", 9, struct.pack("<Q", 7)),
    ),
    Case(
        "wrong dtype",
        "",
        "--train-data-path {data}/train: {data}/train.idx has version 1 and dtype code 99; known: 1, and 1-8",
        overwrite("train.idx", 17, b"\x63"),
    ),
    Case(
        "huge count",
        "",
        "--train-data-path {data}/train: {data}/train.idx holds 2442 bytes but announces 55340232221128655850; "
        "it was cut short or damaged, run tools/preprocess_data.py again",
        overwrite("train.idx", 18, struct.pack("<Q", 1 << 62)),
    ),
    Case(
        "negative length",
        "",
        "--train-data-path {data}/train: {data}/train.idx holds a negative length; it is damaged, run "
        "tools/preprocess_data.py again",
        overwrite("train.idx", 34, struct.pack("<i", -5)),
    ),
    Case(
        "offset beyond the file",
        "",
        "--train-data-path {data}/train: {data}/train.idx has offsets that its lengths do not give; run "
        "tools/preprocess_data.py again",
        overwrite("train.idx", 34 + 4 * 120 + 8, struct.pack("<q", 1 << 40)),
    ),
    Case(
        ".idx of another .bin",
        "",
        "--train-data-path {data}/train: {data}/train.bin holds 8962 bytes but its index announces 1324; it was "
        "cut short or belongs to another index, run tools/preprocess_data.py again",
        copy("valid.idx", "train.idx"),
    ),
    Case(
        "prefix with its ending",
        "--train-data-path {data}/train.bin",
        "--train-data-path {data}/train.bin: no file {data}/train.bin.idx; give the prefix without its ending: "
        "{data}/train",
    ),
    Case(
        "folder as prefix",
        "--train-data-path {data}",
        "--train-data-path {data}: no file {data}.idx; write it with tools/preprocess_data.py",
    ),
    Case(
        "weight without prefix",
        "--train-data-path 0.5",
        "--train-data-path 0.5: weights and prefixes must come in turn (0.3 a 0.7 b), but there are 1 words",
    ),
    Case(
        "negative weight",
        "--train-data-path -1 {data}/train",
        "--train-data-path: weight -1 of {data}/train must be greater than 0",
    ),
    Case(
        "ids beyond the vocabulary",
        "",
        "{data}/train.bin: holds token id 60000, but the vocabulary has 860; it was made with another tokenizer",
        overwrite("train.bin", 100, struct.pack("<H", 60000)),
    ),
    Case(
        "text shorter than a sample",
        "--train-data-path {data}/valid --seq-length 100000",
        "--seq-length 100000: the training part of {data}/valid holds only 662 tokens, a sample takes 100001; "
        "give more text or a shorter --seq-length",
    ),
    Case(
        "no data",
        "",
        "--data-path or --train-data-path: needed, give the prefix of a .bin/.idx pair",
        base=f"{MODEL} {TRAINING} --tokenizer-model {{data}}/bpe.model",
    ),
    Case(
        "evaluation without its data",
        "--eval-interval 1",
        "--valid-data-path: needed, give the prefix of a .bin/.idx pair; --eval-interval 0 trains without",
    ),
    Case("split of nothing", "--split 0,0,0", "--split 0,0,0: at least one share must be greater than 0", base=SHARED),
    Case(
        "split without validation",
        "--split 100 --eval-interval 1",
        "--seq-length 32: the validation part of {data}/train holds only 0 tokens, a sample takes 33; give a "
        "larger share in --split, more text or a shorter --seq-length",
        base=SHARED,
    ),
    Case(
        "cache in a file",
        "--data-cache-path {data}/train.bin",
        "--data-cache-path {data}/train.bin: cannot make the folder: File exists",
    ),
    Case(
        "no tokenizer",
        "--tokenizer-model {data}/none.model",
        "--tokenizer-model {data}/none.model: no such file; tools/build_tokenizer.py writes one",
    ),
    Case(
        "no tokenizer flag",
        "--tokenizer-model none",
        "--tokenizer-model: needed with --tokenizer-type SentencePieceTokenizer; tools/build_tokenizer.py trains one",
    ),
    Case(
        "text as tokenizer",
        "--tokenizer-model {data}/train.jsonl",
        "--tokenizer-model {data}/train.jsonl: not a SentencePiece model, or damaged",
    ),
    Case(
        "empty tokenizer",
        "",
        "--tokenizer-model {data}/bpe.model: is empty; tools/build_tokenizer.py writes one anew",
        write("bpe.model", b""),
    ),
    Case(
        "cut tokenizer",
        "",
        "--tokenizer-model {data}/bpe.model: not a SentencePiece model, or damaged",
        truncate("bpe.model"),
    ),
    Case(
        "folder as tokenizer",
        "--tokenizer-model {data}",
        "--tokenizer-model {data}: is a folder; give a .model file, or --tokenizer-type HuggingFaceTokenizer",
    ),
    Case(
        "Hugging Face tokenizer not there",
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {data}/hf",
        "--tokenizer-model {data}/hf: no such folder; give one that holds tokenizer.json",
    ),
    Case(
        "Hugging Face folder without tokenizer",
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {data}",
        "--tokenizer-model {data}: holds no Hugging Face tokenizer (none of tokenizer.json, "
        "tokenizer_config.json, tokenizer.model, config.json)",
    ),
    Case(
        "vocabulary smaller than the tokenizer's",
        "--vocab-size 800",
        "--vocab-size 800: the tokenizer has 860 ids; leave it out or give at least that",
    ),
    Case(
        "no vocabulary at all",
        "--tokenizer-type NullTokenizer --tokenizer-model none",
        "--tokenizer-type NullTokenizer: needs --vocab-size",
    ),
]


@on_ranks(CASES)
def test_wrong_data(case: Case, world_size: int, place: Place) -> None:
    check_refused(case, world_size, place)
