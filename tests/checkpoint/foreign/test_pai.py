"""PAI's GPT-MoE: folders written by a model in plain torch are read into ours, which must compute the same logits."""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint.convert.blocks import Box, whole
from megatron_moe.checkpoint.foreign.model import ForeignModel
from megatron_moe.checkpoint.foreign.pai import _sections, open_pai
from megatron_moe.checkpoint.foreign.settings import Settings
from megatron_moe.config.base import UserError
from megatron_moe.config.yaml_io import build_run
from megatron_moe.moe.layout import expert_layout
from tests.helpers.attacks import Evil
from tests.helpers.distributed import run_ranks
from tests.helpers.foreign_checkpoints import Broken, Classic, Layout, assert_refused, save_pai
from tests.helpers.foreign_logits import largest_difference, our_logits

# fp32 round-off of a few layers at logits of this size.
TOLERANCE = 1e-4


CASES: dict[str, tuple[Classic, Layout, dict[str, Any]]] = {
    "top-1 pyramid": (Classic(second_bias=False), Layout(), {}),
    "residual, two ranks": (Classic(second_bias=False, residual=True), Layout(ranks=2), {"load_ds_ckpts": True}),
    "network, older names": (
        Classic(second_bias=False, network=6, experts=(0, 2, 0, 2)),
        Layout(older_names=True),
        {"num_experts": [2], "top_k_linear_strategy": "lsoftmax"},
    ),
    "version 0, two ranks": (Classic(second_bias=False), Layout(ranks=2, version=0), {}),
    "version 1, two ranks": (Classic(second_bias=False), Layout(ranks=2, version=1), {}),
    "experts split, exact GELU": (Classic(second_bias=False, tanh=False), Layout(ranks=2, split_experts=True), {}),
    "dense": (Classic(experts=(0, 0)), Layout(ranks=4), {}),
}


def test_logits(tmp_path: Path) -> None:
    opened, weights = [], []
    for number, (model, layout, config) in enumerate(CASES.values()):
        weights.append(model.weights(seed=number))
        opened.append(open_pai(save_pai(tmp_path / str(number), model, weights[-1], layout, **config)))
    (ours,) = run_ranks(1, our_logits, opened)
    for (name, (model, _, _)), weight, logits in zip(CASES.items(), weights, ours, strict=True):
        assert largest_difference(model, weight, logits) < TOLERANCE, name


MODEL = Classic(second_bias=False, residual=True)
EXPERT = "layer_1_expert_2_mp_rank_01_model_states.pt"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pai") / "model"
    return save_pai(folder, MODEL, MODEL.weights(), Layout(ranks=2))


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_file(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def read_all(foreign: ForeignModel) -> None:
    for name, info in foreign.source.infos.items():
        foreign.source.read(whole(name, info.shape))


def test_says_what_is_there(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    foreign = open_pai(folder, {"model": {"seq_length": 16}})
    run = build_run(foreign.sections)
    assert expert_layout(run).experts_per_layer == (0, 2, 0, 4)
    assert (run.moe.mlp_type, run.model.gelu_tanh, run.model.vocab_size) == ("residual", True, 120)
    assert (run.model.seq_length, run.model.max_positions) == (16, 32)
    assert (foreign.tokenizer, foreign.tokenizer_type) == (folder / "tokenizer.json", "JiebaBPETokenizer")
    assert foreign.unused["args, checkpoint_version, iteration, rng_state"] == "of the training run"
    second = "layers.*.mlp.deepspeed_moe.experts.deepspeed_experts.*.dense_4h_to_h.bias (6 of them)"
    assert "never added" in foreign.unused[second]
    assert ["capacity" in foreign.notes[0], "2 tensors are fp32" in foreign.notes[1]] == [True, True]
    assert pickle.loads(pickle.dumps(foreign.source)).infos == foreign.source.infos


def test_reads_a_box_of_several_ranks(folder: Path) -> None:
    name, weights = "layers.0.mlp.dense_h_to_4h.weight", MODEL.weights()
    source = open_pai(folder).source
    part = source.read(Box(name, (40, 3), (20, 5)))
    assert torch.equal(part.float(), weights[name][40:60, 3:8])
    across = source.read(Box("layers.0.mlp.dense_4h_to_h.weight", (1, 47), (2, 2)))
    assert torch.equal(across.float(), weights["layers.0.mlp.dense_4h_to_h.weight"][1:3, 47:49])


def drop(name: str) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return break_it


def shorten(name: str, left: float) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(left * len(content))])

    return break_it


def put_evil(folder: Path) -> None:
    edit_file(folder / "model" / EXPERT, lambda content: content.update(evil=Evil(os.mkdir, "harm-done")))


def rename_expert(folder: Path) -> None:
    (folder / "model" / EXPERT).write_bytes((folder / "model" / EXPERT.replace("expert_2", "expert_1")).read_bytes())


def add_expert(folder: Path) -> None:
    shutil.copy(folder / "model" / EXPERT, folder / "model" / EXPERT.replace("expert_2", "expert_4"))


def lose_tensor(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["model"]["language_model"]["encoder"]["final_layernorm.bias"]

    for rank in range(2):
        edit_file(folder / f"model/mp_rank_0{rank}/model_rng.pt", change)


def add_tensor(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["language_model"]["encoder"]["layers.0.self_attention.gate.weight"] = torch.ones(3)

    for rank in range(2):
        edit_file(folder / f"model/mp_rank_0{rank}/model_rng.pt", change)


def old_format(folder: Path) -> None:
    path = folder / "model" / EXPERT
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)


BROKEN: dict[str, Broken] = {
    "no expert": (drop(f"model/{EXPERT}"), rf"{EXPERT}: missing; the checkpoint has 12 files of experts"),
    "no rank": (drop("model/mp_rank_00"), r"mp_rank_00: missing"),
    "no last rank": (drop("model/mp_rank_01"), r"has 60 rows in 1 mp_rank folder, but config.json says vocab_size 120"),
    "no config": (drop("config.json"), r"config.json: is missing"),
    "no weights": (drop("model"), r"model: no such folder"),
    "other model": (lambda folder: edit_config(folder, model_type="gpt2"), r"model_type 'gpt2': must be 'gpt-moe'"),
    "other width": (lambda folder: edit_config(folder, hidden_size=64, num_attention_heads=8), r"this configuration"),
    "other list": (lambda folder: edit_config(folder, num_experts=[2, 4, 4]), r"one for each of the 2 even layers"),
    "other counts": (lambda folder: edit_config(folder, num_experts=[2, 8]), r"layer_1_expert_4_mp_rank_00.*: missing"),
    "fewer experts": (
        lambda folder: edit_config(folder, num_experts=[2]),
        r"expert_2.*no such expert in a model with 2 2",
    ),
    "as many layers as fill all memory": (
        lambda folder: edit_config(folder, num_hidden_layers=10**10),
        r"at most 10000",
    ),
    "as many experts": (lambda folder: edit_config(folder, num_experts=[10**12]), r"layer_0_expert_2_.*: missing"),
    "other act": (lambda folder: edit_config(folder, hidden_act="relu"), r"hidden_act 'relu': must be 'gelu'"),
    "DeepSpeed's key": (lambda folder: edit_config(folder, load_ds_ckpts=True), r"holds no 'module'"),
    "short rank": (shorten("model/mp_rank_01/model_rng.pt", 0.9), r"mp_rank_01/model_rng.pt: cut short"),
    "empty expert": (shorten(f"model/{EXPERT}", 0), r"cut short, or not a file of torch.save"),
    "evil": (put_evil, r"refers to '(os|posix).mkdir'"),
    "wrong expert": (rename_expert, rf"{EXPERT}: holds expert 1, not 2"),
    "expert too many": (add_expert, r"expert_4"),
    "tensor missing": (lose_tensor, r"lacks final_layernorm.bias"),
    "tensor too many": (add_tensor, r"holds layers.0.self_attention.gate.weight"),
    "old format": (old_format, r"written by torch before 1.6"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_one_line(folder: Path, name: str) -> None:
    assert_refused(open_pai, folder, BROKEN[name])


def test_epsilon_of_the_expert_residual_network() -> None:
    """Its norms have 1e-5 whatever the model's have."""
    model = Classic(network=6)
    with pytest.raises(UserError, match="layernorm_epsilon 1e-12"):
        _sections(
            Settings({"layernorm_epsilon": 1e-12, "use_expert_residual_network": True, "num_experts": [4]}, "x"),
            set(model.weights()),
        )


def test_damage_is_found_when_it_is_read(folder: Path) -> None:
    path = folder / "model" / EXPERT
    content = bytearray(path.read_bytes())
    weight = torch.load(path)[
        "language_model.encoder.layers.3.mlp.deepspeed_moe.experts.deepspeed_experts.2.dense_h_to_4h.weight"
    ]
    place = content.index(weight.numpy().tobytes()[:64])
    content[place + 10] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{EXPERT}: damaged \(a checksum differs\)"):
        read_all(open_pai(folder))


def test_file_that_goes_away(folder: Path) -> None:
    foreign = open_pai(folder)
    (folder / "model" / EXPERT).unlink()
    with pytest.raises(UserError, match=rf"{EXPERT}: cannot be read"):
        read_all(foreign)


@pytest.mark.parametrize(("number", "message"), [(3.0, "differs from its copy in"), (math.inf, "inf or NaN")])
def test_copies_and_overflow(folder: Path, number: float, message: str) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["language_model"]["encoder"]["layers.0.input_layernorm.weight"][5] = number

    for rank in range(1 if math.isfinite(number) else 2):
        edit_file(folder / f"model/mp_rank_0{rank}/model_rng.pt", change)
    with pytest.raises(UserError, match=message):
        read_all(open_pai(folder))
