"""Megatron-DeepSpeed: checkpoints written by a model in plain torch are read into ours, with the same logits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint.foreign.deepspeed import open_deepspeed
from megatron_moe.config.base import UserError
from megatron_moe.config.yaml_io import build_run
from megatron_moe.moe.layout import expert_layout
from tests.helpers.distributed import run_ranks
from tests.helpers.foreign_checkpoints import Broken, Classic, Layout, assert_refused, save_deepspeed
from tests.helpers.foreign_logits import largest_difference, our_logits

TOLERANCE = 1e-4

CASES: dict[str, tuple[Classic, Layout, dict[str, Any]]] = {
    "PR-MoE": (Classic(residual=True), Layout(), {}),
    "one file an expert": (Classic(residual=True), Layout(ranks=2, older_names=True), {"by_layer": False}),
    "bf16, experts split": (Classic(tanh=False), Layout(ranks=2, split_experts=True, dtype=torch.bfloat16), {}),
    "top-2": (Classic(experts=(0, 4, 0, 4), topk=2), Layout(), {"num_experts": [4]}),
    "a list with a dense layer": (Classic(experts=(0, 0, 0, 2)), Layout(), {"num_experts": [1, 2]}),
    "SwiGLU, RMSNorm, rotary, grouped queries": (
        Classic(groups=2, swiglu=True, rms=True, rope=True, bias=False, untied=True),
        Layout(ranks=2, split_experts=True),
        {},
    ),
    "SwiGLU, whole experts": (Classic(swiglu=True, residual=True), Layout(ranks=2), {}),
    "dense": (Classic(experts=(0, 0)), Layout(ranks=2, version=0), {}),
}


def test_logits(tmp_path: Path) -> None:
    opened, weights = [], []
    for number, (model, layout, options) in enumerate(CASES.values()):
        weights.append(model.weights(seed=number, dtype=layout.dtype))
        folder = save_deepspeed(tmp_path / str(number), model, weights[-1], layout, **options)
        opened.append(open_deepspeed(folder))
    (ours,) = run_ranks(1, our_logits, opened)
    for (name, (model, _, _)), weight, logits in zip(CASES.items(), weights, ours, strict=True):
        assert largest_difference(model, weight, logits) < TOLERANCE, name


MODEL = Classic(residual=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_deepspeed(tmp_path_factory.mktemp("ds") / "run", MODEL, MODEL.weights(), Layout(ranks=2))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], ranks: int = 2) -> None:
    for rank in range(ranks):
        path = folder / f"global_step50/mp_rank_0{rank}_model_states.pt"
        content = torch.load(path, weights_only=False)
        change(content)
        torch.save(content, path)


def test_says_what_is_there(folder: Path) -> None:
    foreign = open_deepspeed(folder)
    run = build_run(foreign.sections)
    assert expert_layout(run).experts_per_layer == (0, 2, 0, 4)
    assert (run.moe.mlp_type, run.moe.moe_aux_loss_coeff) == ("residual", 0.01)
    assert "factor 1.25" in foreign.notes[0]
    assert foreign.unused == {
        "checkpoint_version, dp_world_size, iteration, lr_scheduler, num_experts": "of the training run"
    }
    assert open_deepspeed(folder / "global_step50").sections == foreign.sections


def test_arguments_may_be_given(folder: Path) -> None:
    """Instead of the checkpoint's, where it has none, and over them where it has."""
    known = open_deepspeed(folder)
    assert build_run(open_deepspeed(folder, {"model": {"norm_epsilon": 1e-6}}).sections).model.norm_epsilon == 1e-6
    edit(folder, lambda content: content.pop("args"))
    with pytest.raises(UserError, match=r"holds no arguments of its run; give --num-layers, --hidden-size, --num-att"):
        open_deepspeed(folder, {"moe": {"num_experts": (2, 4)}})
    assert open_deepspeed(folder, known.sections).blocks == known.blocks


def test_argument_that_is_an_object(folder: Path) -> None:
    """Classes of the program that wrote it stand in the pickle; none is imported, and what is not needed is fine."""
    import sys
    import types

    module = types.ModuleType("megatron.enums_of_a_test")
    maker = type("Kind", (), {"__module__": module.__name__, "__reduce__": lambda self: (maker, (3,))})
    module.Kind = maker  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    try:
        edit(folder, lambda content: setattr(content["args"], "model_type", object.__new__(maker)))
    finally:
        del sys.modules[module.__name__]
    assert b"megatron.enums_of_a_test" in (folder / "global_step50/mp_rank_00_model_states.pt").read_bytes()
    assert open_deepspeed(folder).sections["model"]["num_layers"] == 4


def argument(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda content: vars(content["args"]).update(values))


def drop(pattern: str) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        for path in (folder / "global_step50").glob(pattern):
            path.unlink()

    return break_it


def spread(folder: Path) -> None:
    for path in (folder / "global_step50").glob("mp_rank*"):
        path.rename(path.with_name(f"zero_pp_rank_0_{path.name}"))


def latest(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "latest").write_text(name) and None


BROKEN: dict[str, Broken] = {
    "no rank": (drop("mp_rank_01*"), r"files of 1 tensor-parallel ranks, but was written by 2"),
    "no first rank": (drop("mp_rank_00*"), r"mp_rank_00_model_states.pt: missing"),
    "no expert": (drop("layer_1_expert_3_mp_rank_00*"), r"layer_1_expert_3_mp_rank_00_model_states.pt: missing"),
    "no weights": (drop("*"), r"holds no mp_rank_00_model_states.pt"),
    "no step": (latest("global_step51"), r"latest: names 'global_step51', which is no folder beside it"),
    "latest beside": (latest("../x"), r"latest: names '../x', which"),
    "latest above": (latest(".."), r"latest: names '..', which"),
    "latest elsewhere": (latest("/"), r"latest: names '/', which"),
    "latest itself": (latest("."), r"latest: names '.', which"),
    "latest below": (latest("global_step50/."), r"latest: names 'global_step50/.', which"),
    "latest of no length": (latest(""), r"latest: names '', which"),
    "latest too long": (latest("x" * 5000), r"latest: is larger than 4,096 bytes"),
    "latest no name": (latest("\0" * 300), r"latest: names "),
    "ZeRO 3": (spread, r"ZeRO stage 3 spread its weights"),
    "pipeline": (
        lambda folder: (folder / "global_step50/layer_03-model_00-model_states.pt").write_bytes(b""),  # type: ignore[func-returns-value]
        r"pipeline parallelism, which is not read",
    ),
    "post norm": (argument(apply_residual_connection_post_layernorm=True), r"post_layernorm True: must be False"),
    "1p": (argument(apply_layernorm_1p=True), r"apply_layernorm_1p True: must be False; our norms"),
    "switch": (argument(num_experts_switch=4), r"num_experts_switch 4"),
    "no layers": (argument(num_layers=None), r"arguments in global_step50: lacks num_layers"),
    "text": (argument(num_layers="four"), r"num_layers 'four': must be a whole number"),
    "other width": (argument(ffn_hidden_size=64), r"dense_h_to_4h"),
    "no residual": (argument(mlp_type="standard"), r"holds layers.1.mlp"),
    "other norm": (argument(normalization="batchnorm"), r"normalization 'batchnorm': must be layernorm or rmsnorm"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_one_line(folder: Path, name: str) -> None:
    assert_refused(open_deepspeed, folder, BROKEN[name])
