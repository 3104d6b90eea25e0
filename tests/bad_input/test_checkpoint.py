"""Checkpoints that are missing, damaged or of another model, and --save folders that cannot be used."""

import shutil
from collections.abc import Callable
from typing import Any

from tests.bad_input.cases import BASE, Case, Place, check_refused, cut, on_ranks

RESUME = f"{BASE} --load {{run}} --save {{run}} --train-iters 4"
LATEST = "latest_checkpointed_iteration.txt"


def write(name: str, text: str) -> Callable[[Place], Any]:
    return lambda place: (place.run / name).write_text(text, encoding="utf-8")


def remove(pattern: str) -> Callable[[Place], Any]:
    def damage(place: Place) -> None:
        for path in sorted(place.checkpoint.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def truncate(pattern: str) -> Callable[[Place], Any]:
    return lambda place: cut(sorted(place.checkpoint.glob(pattern))[0])


def cut_index(place: Place) -> None:
    # Near its start, where paths do not yet shift what is cut.
    path = place.checkpoint / ".metadata"
    path.write_bytes(path.read_bytes()[:100])


def cut_flags(place: Place) -> None:
    # Between two sections: what is left is sound YAML.
    path = place.checkpoint / "config.yaml"
    path.write_text(path.read_text(encoding="utf-8").split("training:")[0], encoding="utf-8")


def flip(pattern: str) -> Callable[[Place], Any]:
    """Change bytes in the middle of a file without changing its length."""

    def damage(place: Place) -> None:
        path = sorted(place.checkpoint.glob(pattern))[0]
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 4096] = bytes(255 - byte for byte in content[middle : middle + 4096])
        path.write_bytes(content)

    return damage


CASES = [
    Case("--load not there", "--load {tmp}/none", "--load {tmp}/none: no such folder; give the --save folder of a run"),
    Case(
        "--load is a file",
        "--load {data}/train.bin",
        "--load {data}/train.bin: no such folder; give the --save folder of a run",
    ),
    Case(
        "--load without checkpoint",
        "--load {data}",
        "--load {data}: holds no checkpoint (latest_checkpointed_iteration.txt is missing)",
    ),
    Case(
        "--load names the checkpoint itself",
        "--load {run}/iter_0000002",
        "--load {run}/iter_0000002: holds no checkpoint (latest_checkpointed_iteration.txt is missing); give the "
        "folder of the run, {run}",
    ),
    Case(
        "latest names a missing step",
        "",
        "{run}/latest_checkpointed_iteration.txt: names step 7, but iter_0000007 is not there; write the step of "
        "a checkpoint that is, there are: iter_0000002",
        write(LATEST, "7\n"),
        base=RESUME,
    ),
    Case(
        "latest is no number",
        "",
        "{run}/latest_checkpointed_iteration.txt: holds 'release', expected the number of a step",
        write(LATEST, "release\n"),
        base=RESUME,
    ),
    Case(
        "latest is empty",
        "",
        "{run}/latest_checkpointed_iteration.txt: holds '', expected the number of a step",
        write(LATEST, ""),
        base=RESUME,
    ),
    Case(
        "another hidden size",
        "--hidden-size 64",
        "--hidden-size 64: the checkpoint {run}/iter_0000002 was written with 32; give the same, or another --load",
        base=RESUME,
    ),
    Case(
        "other expert counts",
        "--num-experts 8",
        "--num-experts 0 8 0 8: the checkpoint {run}/iter_0000002 was written with 0 4 0 8; give the same, or "
        "another --load",
        base=RESUME,
    ),
    Case(
        "another top-k",
        "--moe-router-topk 2",
        "--moe-router-topk 2: the checkpoint {run}/iter_0000002 was written with 1; give the same, or another --load",
        base=RESUME,
    ),
    Case(
        "another kind of MLP",
        "--mlp-type standard",
        "--mlp-type standard: the checkpoint {run}/iter_0000002 was written with residual; give the same, or "
        "another --load",
        base=RESUME,
    ),
    Case(
        "other layers",
        "--num-layers 6 --num-experts 4 8 8",
        "--num-layers 6: the checkpoint {run}/iter_0000002 was written with 4; give the same, or another --load",
        base=RESUME,
    ),
    Case(
        "another vocabulary size",
        "--vocab-size 900",
        "--vocab-size 900: the checkpoint {run}/iter_0000002 was written with 860; give the same, or another --load",
        base=RESUME,
    ),
    Case(
        "tokenizer of other pieces",
        "--tokenizer-model {data}/other.model",
        "--tokenizer-model {data}/other.model: id 292 is '为天', in that of the checkpoint "
        "{run}/iter_0000002/tokenizer it is '不过'; give the tokenizer the run was trained with",
        base=RESUME,
    ),
    Case(
        "tokenizer of another size",
        "--tokenizer-model {data}/small.model",
        "--tokenizer-model {data}/small.model: has 800 pieces, that of the checkpoint "
        "{run}/iter_0000002/tokenizer has 860; give the tokenizer the run was trained with",
        base=RESUME,
    ),
    Case(
        "cut tensors",
        "",
        "{run}/iter_0000002/__0_0.distcp: cut short, or .metadata beside it is damaged: "
        "'optimizer.state.exp_avg.decoder.layers.1.mlp.experts.experts.linear_fc1.weight' is said to end at byte "
        "1397647, it holds 1383228",
        truncate("*.distcp"),
        base=RESUME,
    ),
    Case(
        "no tensors",
        "",
        "{run}/iter_0000002/__0_0.distcp: No such file or directory; .metadata beside it names it as a part of "
        "the checkpoint",
        remove("*.distcp"),
        base=RESUME,
    ),
    Case(
        "cut .metadata",
        "",
        "{run}/iter_0000002/.metadata: damaged, or not a checkpoint of this program (expected 32 bytes in a "
        "unicodestring1, but only 3 remain); restore it or load another step",
        cut_index,
        base=RESUME,
    ),
    Case(
        "no .metadata",
        "",
        "{run}/iter_0000002/.metadata: cannot be read: No such file or directory; the checkpoint is not whole",
        remove(".metadata"),
        base=RESUME,
    ),
    Case(
        "no config.yaml",
        "",
        "{run}/iter_0000002/config.yaml: cannot be read: No such file or directory",
        remove("config.yaml"),
        base=RESUME,
    ),
    Case(
        "cut config.yaml",
        "",
        "{run}/iter_0000002/config.yaml: lacks the section parallel; it was cut short, restore it or load another step",
        cut_flags,
        base=RESUME,
    ),
    Case(
        "no tokenizer",
        "",
        "{run}/iter_0000002/tokenizer: holds no tokenizer (megatron_moe_tokenizer.json is missing); the "
        "checkpoint is not whole",
        remove("tokenizer"),
        base=RESUME,
    ),
    Case(
        "cut tokenizer",
        "",
        "{run}/iter_0000002/tokenizer/tokenizer.model: not a SentencePiece model, or damaged",
        truncate("tokenizer/*.model"),
        base=RESUME,
    ),
    Case(
        "cut description of the tokenizer",
        "",
        "{run}/iter_0000002/tokenizer/megatron_moe_tokenizer.json: damaged, does not say which tokenizer lies "
        "beside it (Unterminated string starting at: line 2 column 20 (char 21))",
        truncate("tokenizer/*.json"),
        base=RESUME,
    ),
    Case(
        "--save holds another run",
        "--save {run}",
        "--save {run}: holds a run that has reached step 2; go on from it with --load {run}, or give another folder",
    ),
    Case(
        "--save of another run than --load",
        "--load {run} --save {tmp}/other",
        "--save {tmp}/other: holds a run that has reached step 2; go on from it with --load {tmp}/other, or give "
        "another folder",
        lambda place: shutil.copytree(place.run, place.folder / "other"),
    ),
    Case("--save is a file", "--save {data}/train.bin", "--save {data}/train.bin: is a file; give a folder"),
    Case(
        "--save below a file",
        "--save {data}/train.bin/run",
        "--save {data}/train.bin/run: cannot be written: Not a directory; give a place that can be written",
    ),
    Case(
        "--save where nothing can be written",
        "--save /proc/run",
        "--save /proc/run: cannot be written: No such file or directory; give a place that can be written",
    ),
    Case("--save without a folder to keep", "--keep-last 2", "--save-interval and --keep-last: need --save"),
    Case(
        "generate from nothing",
        "--load {tmp}/none --prompt a",
        "--load {tmp}/none: no such folder; give the --save folder of a run",
        base="",
        program="megatron_moe.generate",
    ),
    Case(
        "generate from a damaged checkpoint",
        "--load {run} --prompt a --max-new-tokens 4 --device cpu",
        "{run}/iter_0000002/__0_0.distcp: cut short, or .metadata beside it is damaged: "
        "'optimizer.state.exp_avg.decoder.layers.1.mlp.experts.experts.linear_fc1.weight' is said to end at byte "
        "1397647, it holds 1383228",
        truncate("*.distcp"),
        base="",
        program="megatron_moe.generate",
    ),
    Case(
        "generate too long",
        "--load {run} --prompt a --max-new-tokens 40 --device cpu",
        "--max-new-tokens 40: with the 1 tokens of prompt 1 that is more than the 32 positions of the model "
        "(--max-position-embeddings); give at most 31",
        base="",
        program="megatron_moe.generate",
    ),
    Case(
        "generate from a step that is not there",
        "--load {run} --prompt a --iteration 9",
        "--iteration 9: {run} holds no such checkpoint; there are 2",
        base="",
        program="megatron_moe.generate",
    ),
    Case(
        "generate under a layout that does not fit",
        "--load {run} --prompt a --pipeline-model-parallel-size 3 --device cpu",
        "--tensor-model-parallel-size 1 x --pipeline-model-parallel-size 3 x --context-parallel-size 1 = 3: must "
        "divide the number of processes, which is {world}",
        base="",
        program="megatron_moe.generate",
    ),
    Case(
        "score without its tokenizer",
        "--load {run} --input {data}/valid.jsonl --output {tmp}/out.jsonl",
        "{run}/iter_0000002/tokenizer: holds no tokenizer (megatron_moe_tokenizer.json is missing); the "
        "checkpoint is not whole",
        remove("tokenizer"),
        base="",
        program="megatron_moe.score",
    ),
    Case(
        "score of nothing",
        "--load {run} --input {data}/none.jsonl --output {tmp}/out.jsonl",
        "--input {data}/none.jsonl: no such file; give JSON Lines files (.jsonl or .jsonl.gz)",
        base="",
        program="megatron_moe.score",
    ),
    Case(
        "score into a folder",
        "--load {run} --input {tmp}/in.jsonl --output {data}",
        "--output {data}: is a folder; give a file",
        lambda place: (place.folder / "in.jsonl").write_text('{"ids": [5, 6]}\n', encoding="utf-8"),
        base="",
        program="megatron_moe.score",
    ),
    Case(
        "score with a flag of training",
        "--load {run} --input {data}/valid.jsonl --output {tmp}/out.jsonl --lr 1",
        "--lr: unknown flag; --help lists the flags",
        base="",
        program="megatron_moe.score",
    ),
    Case(
        "evaluate on cut text",
        "--load {run} --data-path {data}/valid --device cpu",
        "--data-path {data}/valid: {data}/valid.bin holds 662 bytes but its index announces 1324; it was cut "
        "short or belongs to another index, run tools/preprocess_data.py again",
        lambda place: cut(place.data / "valid.bin"),
        base="",
        program="megatron_moe.evaluate",
    ),
]


@on_ranks(CASES)
def test_wrong_checkpoint(case: Case, world_size: int, place: Place) -> None:
    check_refused(case, world_size, place)
