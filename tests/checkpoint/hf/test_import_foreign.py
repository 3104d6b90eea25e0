"""from-pai, from-deepspeed and from-megatron: real commands, and runs that compute what the other program computes."""

from pathlib import Path

import pytest
import torch

from tests.helpers.converting import converted, refused
from tests.helpers.distributed import run_ranks
from tests.helpers.foreign_checkpoints import Classic, Layout, save_deepspeed, save_pai
from tests.helpers.foreign_logits import IDS, largest_difference
from tests.helpers.stock_megatron import Stock, save_stock

TOLERANCE = 1e-4
TIED = {"share_embeddings_and_output_weights": True}
PYRAMID = Classic(second_bias=False, residual=True)
# PAI's model holds the second biases of experts too, but never adds them.
WITH_BIASES = Classic(residual=True)


def run_logits(folders: list[Path]) -> list[torch.Tensor]:
    """Of runs, each loaded as generation loads it."""
    from megatron_moe.inference.model import load_for_inference

    return [load_for_inference(str(folder), eval_fp32=True).logits(IDS[None])[0] for folder in folders]


def test_commands(tmp_path: Path) -> None:
    weights, others = PYRAMID.weights(), WITH_BIASES.weights()
    pai = save_pai(tmp_path / "pai", PYRAMID, weights, Layout(ranks=2))
    deepspeed = save_deepspeed(tmp_path / "deepspeed", WITH_BIASES, others, Layout(ranks=2))
    (stock,) = run_ranks(1, save_stock, tmp_path / "megatron", {"dense": Stock(model=TIED)}, IDS.tolist())
    folders = {"pai": pai, "deepspeed": deepspeed, "megatron": tmp_path / "megatron" / "dense"}
    runs = {name: tmp_path / "runs" / name for name in folders}
    for name, folder in folders.items():
        # Gates are fp32 in fp16 checkpoints.
        words = ["--source", folder, "--save", runs[name], "--tokenizer", "NullTokenizer", "--dtype", "fp32"]
        printed = converted(f"from-{name}", *words)
        (line,) = [line for line in printed.splitlines() if "placed exactly once" in line]
        assert line.startswith("every number of every tensor on both sides was placed exactly once; ")
        assert line.endswith("; logits were NOT compared: there is no second program for this format")
        assert "left out: " in printed
    ours = dict(zip(runs, run_ranks(1, run_logits, list(runs.values()))[0], strict=True))
    assert largest_difference(PYRAMID, weights, ours["pai"]) < TOLERANCE
    assert largest_difference(WITH_BIASES, others, ours["deepspeed"]) < TOLERANCE
    assert float((ours["megatron"] - stock["dense"][:, : ours["megatron"].shape[1]]).abs().max()) < TOLERANCE
    shown = converted("inspect", pai)
    assert "PAI's GPT-MoE" in shown
    assert "experts     0 2 0 4 (per layer)" in shown
    assert "checkpoint of Megatron-DeepSpeed" in converted("inspect", deepspeed)
    assert "checkpoint of megatron-core" in converted("inspect", folders["megatron"])


@pytest.fixture(scope="module")
def pai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pai(tmp_path_factory.mktemp("pai") / "model", PYRAMID, PYRAMID.weights(), Layout())


def test_what_is_refused(pai: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    assert "holds no tokenizer" in refused("from-pai", "--source", pai, "--save", save)
    line = refused("from-deepspeed", "--source", pai, "--save", save, "--tokenizer", "NullTokenizer")
    assert str(pai) in line
    (tmp_path / "flags.yaml").write_text("model:\n  hidden_size: 48\n")
    words = ["--config", tmp_path / "flags.yaml", "--tokenizer", "NullTokenizer"]
    assert "shape" in refused("from-pai", "--source", pai, "--save", save, *words)
    assert not list(tmp_path.glob("run*"))
