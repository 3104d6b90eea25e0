"""Megatron-LM's checkpoints by ranks: stock GPTModels and the models before them are read with their logits."""

import argparse
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint.foreign.megatron import open_megatron
from tests.checkpoint.foreign.test_megatron import models
from tests.helpers.distributed import run_ranks
from tests.helpers.foreign_checkpoints import Broken, Classic, Layout, assert_refused, rank_tree
from tests.helpers.foreign_logits import IDS, largest_difference, our_logits
from tests.helpers.stock_megatron import save_stock

FILE = "model_optim_rng.pt"
SWIGLU, EXPERTS = "SwiGLU, rotary, queries in groups", "experts in every other layer"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """`two` by two tensor-parallel ranks, `experts` by one."""
    folder = tmp_path_factory.mktemp("ranks")
    two = dataclasses.replace(models()[SWIGLU], by_ranks=True)
    parts = run_ranks(2, save_stock, folder, {"two": two}, IDS.tolist(), 2)
    one = {name: dataclasses.replace(models()[name], by_ranks=True) for name in (EXPERTS, "dense")}
    ((logits),) = run_ranks(1, save_stock, folder, one, IDS.tolist())
    return folder, {"two": torch.cat([part["two"] for part in parts], dim=-1), **logits}


def save_stages(folder: Path) -> None:
    """Split a checkpoint of one rank into two pipeline stages, as two stages would have saved it."""
    step = folder / "iter_0000005"
    tree = torch.load(step / "mp_rank_00" / FILE, weights_only=False)
    shutil.rmtree(step / "mp_rank_00")
    tree["args"].pipeline_model_parallel_size = 2
    states: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for name, value in tree["model"].items():
        stage = int(name.startswith(("decoder.layers.1.", "decoder.final")))
        states[stage][name.replace("decoder.layers.1.", "decoder.layers.0.")] = value
    states[1]["output_layer.weight"] = tree["model"]["embedding.word_embeddings.weight"]
    for stage, state in enumerate(states):
        path = step / f"mp_rank_00_{stage:03d}"
        path.mkdir()
        torch.save({**tree, "model": state}, path / FILE)


def save_classic(folder: Path, model: Classic, weights: dict[str, torch.Tensor], layout: Layout) -> Path:
    args = argparse.Namespace(
        num_layers=len(model.experts),
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        max_position_embeddings=model.positions,
        layernorm_epsilon=model.eps,
        bias_gelu_fusion=True,
        padded_vocab_size=model.vocab,
        model_parallel_size=layout.ranks,
    )
    for rank in range(layout.ranks):
        path = folder / "release" / f"mp_rank_{rank:02d}"
        path.mkdir(parents=True)
        tree = {"model": rank_tree(model, weights, rank, layout), "args": args, "checkpoint_version": layout.version}
        torch.save(tree, path / FILE)
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    return folder


def test_logits(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, stock = saved
    staged = Path(shutil.copytree(folder / "dense", tmp_path / "staged"))
    save_stages(staged)
    classic = Classic(experts=(0, 0))
    weights = classic.weights()
    old = save_classic(tmp_path / "classic", classic, weights, Layout(ranks=2, version=1, older_names=True))
    names = ["two", EXPERTS, "dense"]
    opened = [open_megatron(path) for path in (*(folder / name for name in names), staged, old)]
    (ours,) = run_ranks(1, our_logits, opened)
    for name, logits in zip([*names, "dense"], ours, strict=False):
        assert float((logits[:, : stock[name].shape[-1]] - stock[name]).abs().max()) < 1e-5, name
    assert largest_difference(classic, weights, ours[-1]) < 1e-4
    assert opened[3].unused["output_layer.weight"] == "the last stage's copy of the embedding"


@pytest.fixture
def folder(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0] / "two", tmp_path / "copy"))


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        for path in (folder / "iter_0000005").glob(f"mp_rank_*/{FILE}"):
            content = torch.load(path, weights_only=False)
            change(content)
            torch.save(content, path)

    return break_it


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.rmtree(folder / "iter_0000005" / name)


def move(one: str, other: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "iter_0000005" / one).rename(folder / "iter_0000005" / other) and None


BROKEN: dict[str, Broken] = {
    "no rank": (drop("mp_rank_01"), r"mp_rank_01: missing; the checkpoint is of 2 x 1 ranks"),
    "no first rank": (drop("mp_rank_00"), r"mp_rank_00: missing"),
    "virtual stages": (
        edit(lambda tree: tree.update(model0=tree.pop("model"))),
        r"virtual pipeline stages are not read",
    ),
    "expert-parallel": (move("mp_rank_01", "mp_rank_01_000_001"), r"expert-parallel ranks' files are not read"),
    "by expert ranks": (
        edit(lambda tree: vars(tree["args"]).update(expert_model_parallel_size=2)),
        r"expert_model_parallel_size 2: must be 1",
    ),
    "tensor missing": (
        edit(lambda tree: tree["model"].pop("decoder.layers.1.self_attention.linear_proj.weight")),
        r"holds nothing for decoder.layers.1.self_attention.linear_proj.weight, which",
    ),
    "tensor too many": (
        edit(lambda tree: tree["model"].update({"decoder.layers.1.gate.weight": torch.ones(2)})),
        r"holds decoder.layers.1.gate.weight, which is no part of a GPTModel",
    ),
    "no output layer": (
        edit(lambda tree: tree["model"].pop("output_layer.weight")),
        r"lacks output_layer.weight, though untie_embeddings_and_output_weights is True",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_one_line(folder: Path, name: str) -> None:
    assert_refused(open_megatron, folder, BROKEN[name])
