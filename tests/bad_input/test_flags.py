"""Wrong flags and layouts that do not fit: refused before anything is built."""

import os
from collections.abc import Callable
from typing import Any

import pytest

from megatron_moe.config.yaml_io import recipe_names
from tests.bad_input.cases import BASE, PRETRAIN, Case, Place, check_codes, check_refused, on_ranks
from tests.helpers.launch import launch


def write(name: str, text: str) -> Callable[[Place], Any]:
    return lambda place: (place.folder / name).write_text(text, encoding="utf-8")


DRY = "--dry-run --world-size 4"
CASES = [
    Case("unknown flag", "--num-layer 3", "--num-layer: unknown flag; did you mean --num-layers?"),
    Case(
        "misspelt value",
        "--lr-decay-style cosin",
        "--lr-decay-style cosin: must be one of constant, linear, cosine, inverse-square-root, WSD; did you mean "
        "cosine?",
    ),
    Case("text for a number", "--num-layers four", "--num-layers four: must be an integer"),
    Case("fraction for an integer", "--hidden-size 32.5", "--hidden-size 32.5: must be an integer"),
    Case("flag without its value", "--seed", "--seed: needs an integer"),
    Case("value without a flag", "--bf16 yes", "--bf16 yes: takes no value; --bf16 is a switch"),
    Case("two precisions", "--bf16 --fp16", "--bf16 and --fp16: give one of them"),
    Case("two sources of data", "--data-path {data}/train", "--data-path and --train-data-path: give one of them"),
    Case(
        "unknown recipe",
        "--recipe tiny-cpo",
        f"--recipe tiny-cpo: unknown; did you mean tiny-cpu? There are: {', '.join(recipe_names())}",
    ),
    Case(
        "config file that is not there",
        "--config {tmp}/run.yaml",
        "{tmp}/run.yaml: cannot be read: No such file or directory",
    ),
    Case("config file that is a folder", "--config {tmp}", "{tmp}: cannot be read: Is a directory"),
    Case(
        "broken YAML",
        "--config {tmp}/run.yaml",
        "{tmp}/run.yaml, line 3: expected ',' or ']', but got '<stream end>'",
        write("run.yaml", "model:\n  num_layers: [4\n"),
    ),
    Case(
        "YAML with an unknown key",
        "--config {tmp}/run.yaml",
        "{tmp}/run.yaml: model.num_layer: unknown key; did you mean num_layers?",
        write("run.yaml", "model:\n  num_layer: 4\n"),
    ),
    Case(
        "YAML with a wrong type",
        "--config {tmp}/run.yaml",
        "{tmp}/run.yaml: model.num_layers: True: must be an integer",
        write("run.yaml", "model:\n  num_layers: true\n"),
    ),
    Case(
        "YAML key twice",
        "--config {tmp}/run.yaml",
        "{tmp}/run.yaml, line 3: key num_layers given twice",
        write("run.yaml", "model:\n  num_layers: 4\n  num_layers: 5\n"),
    ),
    Case(
        "YAML that is no mapping",
        "--config {tmp}/run.yaml",
        "{tmp}/run.yaml: the file must be a mapping (key: value), not str",
        write("run.yaml", "just text\n"),
    ),
    Case("micro batch 0", "--micro-batch-size 0", "--micro-batch-size 0: must be at least 1"),
    Case("negative learning rate", "--lr -0.01", "--lr -0.01: must be at least 0"),
    Case("learning rate nan", "--lr nan", "--lr nan: must be a finite number"),
    Case("clip inf", "--clip-grad inf", "--clip-grad inf: must be a finite number"),
    Case(
        "capacity inf", "--moe-expert-capacity-factor inf", "--moe-expert-capacity-factor inf: must be a finite number"
    ),
    Case("capacity 0", "--moe-expert-capacity-factor 0", "--moe-expert-capacity-factor 0.0: must be greater than 0"),
    Case(
        "capacity too large to pad",
        "--moe-expert-capacity-factor 1e9 --moe-pad-expert-input-to-capacity",
        "--moe-expert-capacity-factor 1000000000.0: must be at most 4 (the smallest of --num-experts / "
        "--moe-router-topk) with --moe-pad-expert-input-to-capacity",
    ),
    Case("dropout 1.5", "--hidden-dropout 1.5", "--hidden-dropout 1.5: must be in [0, 1)"),
    Case("beta 1", "--adam-beta2 1", "--adam-beta2 1.0: must be in [0, 1)"),
    Case(
        "heads do not divide the hidden size",
        "--hidden-size 34",
        "--hidden-size 34: must be a multiple of --num-attention-heads 4, or give --kv-channels",
    ),
    Case(
        "more experts per token than experts",
        "--moe-router-topk 5",
        "--moe-router-topk 5: must be at most the smallest of --num-experts (4)",
    ),
    Case(
        "counts for other layers",
        "--num-experts 4 8 8",
        "--num-experts 4 8 8: must be one count, or 2 counts for the MoE layers 2, 4; got 3",
    ),
    Case("no layer is a MoE layer", "--expert-interval 5", "--expert-interval 5: must be at most --num-layers 4"),
    Case(
        "tensor size does not divide the heads",
        "--num-attention-heads 2 --tensor-model-parallel-size 4",
        "--tensor-model-parallel-size 4: must divide --num-attention-heads 2",
        on_one=DRY,
    ),
    Case(
        "expert size does not divide the experts",
        "--num-experts 6 8 --expert-model-parallel-size 4",
        "--expert-model-parallel-size 4: must be a divisor or a multiple of the number of experts of every layer; "
        "layer 2 has 6",
        on_one=DRY,
    ),
    Case(
        "pipeline does not divide the layers",
        "--num-layers 6 --num-experts 4 --pipeline-model-parallel-size 4",
        "--pipeline-model-parallel-size 4: must divide --num-layers 6",
        on_one=DRY,
    ),
    Case(
        "processes not a multiple of the model's",
        "--tensor-model-parallel-size 3",
        "--tensor-model-parallel-size 3 x --pipeline-model-parallel-size 1 x --context-parallel-size 1 = 3: must "
        "divide the number of processes, which is 4",
        on_one=DRY,
    ),
    Case(
        "more expert ranks than processes",
        "--expert-model-parallel-size 8",
        "--expert-tensor-parallel-size 1 x --expert-model-parallel-size 8 x --pipeline-model-parallel-size 1 = "
        "8: must divide the number of processes, which is 4",
        on_one=DRY,
    ),
    Case(
        "sequence not cut evenly",
        "--seq-length 30 --context-parallel-size 4",
        "--seq-length 30: must be a multiple of 2 x --context-parallel-size 4 = 8",
        on_one=DRY,
    ),
    Case(
        "global batch not divisible",
        "--global-batch-size 12",
        "--global-batch-size 12: must be a multiple of --micro-batch-size 2 x data-parallel size 4 = 8",
        on_one=DRY,
    ),
    Case(
        "ramp-up that does not arrive",
        "--global-batch-size 32 --rampup-batch-size 8 16 100",
        "--rampup-batch-size 8 16 100: must be START and INCREMENT that are multiples of --micro-batch-size 2 x "
        "data-parallel size 4 = 8, with steps of INCREMENT leading from START to --global-batch-size 32",
        on_one=DRY,
    ),
    Case(
        "warm-up longer than the run",
        "--lr-warmup-iters 2",
        "--lr-warmup-iters 2: must be less than the training steps, 2",
    ),
    Case("no end", "--train-iters none", "--train-iters: is required (or --train-tokens)"),
    Case(
        "CUDA where there is none",
        "--device cuda",
        "--device cuda: torch sees no GPU here; use --device cpu, or see python -m megatron_moe.doctor",
        environment={"CUDA_VISIBLE_DEVICES": ""},
    ),
    Case(
        "Transformer Engine on a CPU",
        "--transformer-impl transformer_engine",
        "--transformer-impl transformer_engine: needs a GPU; with --device cpu it is local",
    ),
    Case("finetune of nothing", "--finetune", "--finetune: needs --load"),
    Case(
        "a dense model with a MoE flag",
        "--num-experts none --mlp-type standard --expert-interval 1 --moe-router-topk 2",
        "--moe-router-topk 2: needs --num-experts",
    ),
]


@on_ranks(CASES)
def test_wrong_flag(case: Case, world_size: int, place: Place) -> None:
    check_refused(case, world_size, place)


def forget_the_rank() -> None:
    os.environ.pop("RANK", None)


@pytest.mark.parametrize("world_size", [1, 4])
def test_half_a_launcher(world_size: int, place: Place) -> None:
    """WORLD_SIZE without RANK, as a hand-made start script leaves it."""
    words = place.fill(BASE).split()
    done = launch(world_size, PRETRAIN, *words, environment={"WORLD_SIZE": "4"}, prepare=(forget_the_rank,))
    assert done.stderr == "error: WORLD_SIZE 4: the environment lacks RANK; set both (torchrun does) or none\n"
    check_codes(done)
