"""Distributed checkpoints of stock GPTModels, written by megatron-core, are read into ours, with the same logits."""

import dataclasses
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.checkpoint.convert.engine import check_fills
from megatron_moe.checkpoint.foreign.megatron import open_megatron
from megatron_moe.checkpoint.foreign.megatron_args import megatron_sections
from megatron_moe.checkpoint.foreign.settings import Settings
from megatron_moe.config.base import UserError
from megatron_moe.config.yaml_io import build_run
from tests.helpers.attacks import Evil
from tests.helpers.distributed import run_ranks
from tests.helpers.foreign_checkpoints import Broken, assert_refused
from tests.helpers.foreign_logits import IDS, our_logits
from tests.helpers.stock_megatron import Stock, save_stock

TOLERANCE = 1e-5
_TIED = {"share_embeddings_and_output_weights": True}
_LLAMA = {"normalization": "RMSNorm", "gated_linear_unit": True, "add_bias_linear": False}
_ROTARY = {"position_embedding_type": "rope", "share_embeddings_and_output_weights": False}
_LLAMA_ARGUMENTS = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True,
}


def models() -> dict[str, Stock]:
    import torch.nn.functional as F

    llama = {**_LLAMA, "activation_func": F.silu}
    return {
        "dense": Stock(model=_TIED),
        "dense, fused GELU": Stock(
            config={"bias_activation_fusion": True},
            model=_TIED,
            arguments={"bias_gelu_fusion": True},
            legacy_common=True,
        ),
        "SwiGLU, rotary, queries in groups": Stock(
            config={**llama, "num_query_groups": 2, "qk_layernorm": True, "add_qkv_bias": True},
            model=_ROTARY,
            arguments={
                **_LLAMA_ARGUMENTS,
                "group_query_attention": True,
                "num_query_groups": 2,
                "qk_layernorm": True,
                "add_qkv_bias": True,
            },
        ),
        "halves apart": Stock(
            config=llama,
            model=_ROTARY,
            arguments=_LLAMA_ARGUMENTS,
            metadata={"singleton_local_shards": True},
        ),
        "experts in every other layer": Stock(
            config={
                **llama,
                "num_moe_experts": 4,
                "moe_layer_freq": [0, 1],
                "moe_shared_expert_intermediate_size": 64,
                "moe_router_topk": 2,
                "moe_ffn_hidden_size": 96,
            },
            model=_ROTARY,
            arguments={
                **_LLAMA_ARGUMENTS,
                "num_experts": 4,
                "moe_layer_freq": [0, 1],
                "moe_shared_expert_intermediate_size": 64,
                "moe_ffn_hidden_size": 96,
            },
        ),
        "sigmoid with biases": Stock(
            config={
                "num_moe_experts": 4,
                "moe_router_topk": 2,
                "moe_router_score_function": "sigmoid",
                "moe_router_enable_expert_bias": True,
                "moe_router_topk_scaling_factor": 1.7,
            },
            model=_TIED,
            arguments={
                "num_experts": 4,
                "moe_router_score_function": "sigmoid",
                "moe_router_enable_expert_bias": True,
                "moe_router_topk_scaling_factor": 1.7,
                "moe_router_load_balancing_type": ["aux_loss"],
                "moe_aux_loss_coeff": [0.01],
            },
        ),
        "top-1": Stock(
            config={
                "num_moe_experts": 2,
                "moe_router_topk": 1,
                "moe_router_pre_softmax": True,
                "add_bias_linear": False,
            },
            model=_TIED,
            arguments={
                "num_experts": 2,
                "moe_router_topk": 1,
                "moe_router_pre_softmax": True,
                "moe_layer_freq": 1,
                "add_bias_linear": False,
            },
        ),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("megatron")
    (logits,) = run_ranks(1, save_stock, folder, models(), IDS.tolist())
    return folder, logits


def test_logits(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, stock = saved
    (ours,) = run_ranks(1, our_logits, [open_megatron(folder / name) for name in stock])
    found = {
        name: float((logits[:, : expected.shape[-1]] - expected).abs().max())
        for (name, expected), logits in zip(stock.items(), ours, strict=True)
    }
    assert max(found.values()) < TOLERANCE, found


def test_logits_of_two_ranks(tmp_path: Path) -> None:
    """Each rank wrote its halves of the gate and of the value."""
    name = "SwiGLU, rotary, queries in groups"
    parts = run_ranks(2, save_stock, tmp_path, {name: models()[name]}, IDS.tolist(), 2)
    expected = torch.cat([part[name] for part in parts], dim=-1)
    ((logits,),) = run_ranks(1, our_logits, [open_megatron(tmp_path / name)])
    assert float((logits[:, : expected.shape[-1]] - expected).abs().max()) < TOLERANCE


@pytest.fixture
def folder(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0] / "dense, fused GELU", tmp_path / "copy"))


def step(folder: Path) -> Path:
    return folder / "iter_0000005"


def edit_common(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = step(folder) / "common.pt"
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def argument(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_common(folder, lambda content: vars(content["args"]).update(values))


def test_says_what_is_there(folder: Path) -> None:
    foreign = open_megatron(folder)
    run = build_run(foreign.sections)
    assert (run.model.gelu_tanh, run.model.vocab_size, run.model.norm_epsilon) == (True, 120, 1e-5)
    assert foreign.unused == {"checkpoint_version, iteration": "of the training run"}
    assert open_megatron(step(folder)).blocks == foreign.blocks
    assert pickle.loads(pickle.dumps(foreign.source)).infos == foreign.source.infos


def test_arguments_may_be_given(folder: Path) -> None:
    known = open_megatron(folder).sections
    (step(folder) / "common.pt").unlink()
    with pytest.raises(UserError, match="give --num-layers, --hidden-size, --num-attention-heads"):
        open_megatron(folder)
    assert open_megatron(folder, known).sections == known


def test_release(folder: Path) -> None:
    step(folder).rename(folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert open_megatron(folder).source.infos


def shorten(folder: Path) -> None:
    (path,) = step(folder).glob("*.distcp")
    path.write_bytes(path.read_bytes()[:-5000])


def change_latest(text: str) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        (folder / "latest_checkpointed_iteration.txt").write_text(text)

    return break_it


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (step(folder) / name).unlink()


def evil_index(folder: Path) -> None:
    (step(folder) / ".metadata").write_bytes(pickle.dumps(Evil(os.mkdir, "harm-done")))


BROKEN: dict[str, Broken] = {
    "no index": (drop(".metadata"), r"iter_0000005: holds neither .metadata \(--ckpt-format torch_dist\) nor mp_rank"),
    "no latest": (
        lambda folder: (folder / "latest_checkpointed_iteration.txt").unlink(),
        r"holds neither .metadata nor",
    ),
    "other latest": (change_latest("../../x"), r"holds '../../x', which is no iteration"),
    "no step": (change_latest("6"), r"iter_0000006: no such folder"),
    "no data": (drop("__0_0.distcp"), r"__0_0.distcp: No such file"),
    "short data": (shorten, r"__0_0.distcp: cut short"),
    "evil arguments": (
        lambda folder: edit_common(folder, lambda content: content.update(evil=Evil(os.mkdir, "harm-done"))),
        r"refers to '(os|posix).mkdir'",
    ),
    "evil index": (evil_index, r".metadata: refers to '(os|posix).mkdir'"),
    "other depth": (argument(num_layers=1), r"iter_0000005: num_layers 1, but the weights are of 2 layers"),
    "untied": (argument(untie_embeddings_and_output_weights=True), r"lacks output_layer.weight"),
    "latent attention": (argument(multi_latent_attention=True), r"multi_latent_attention True: must be False"),
    "window": (argument(window_size=(128, 0)), r"window_size \(128, 0\): must be left out; every token"),
    "positions": (argument(position_embedding_type="yarn"), r"'yarn': must be learned_absolute or rope or none"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_one_line(folder: Path, name: str) -> None:
    assert_refused(open_megatron, folder, BROKEN[name])


SIZES = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 32}


def sections(**arguments: Any) -> dict[str, dict[str, Any]]:
    return megatron_sections(Settings({**SIZES, **arguments}, "arguments"), 128)


def test_layers_with_experts() -> None:
    """A number N means layers 0, N, 2N, ...: the first has experts, unlike with --expert-interval."""
    run = build_run(sections(num_experts=8, moe_layer_freq=2, moe_router_topk=2))
    assert run.moe.experts_per_layer(4) == (8, 0, 8, 0)
    with pytest.raises(UserError, match=r"moe_layer_freq \[1, 0\]: must be a number, or 4 numbers"):
        sections(num_experts=8, moe_layer_freq=[1, 0])


@pytest.mark.parametrize(
    ("arguments", "tanh"),
    [
        ({}, True),
        ({"bias_gelu_fusion": False}, False),
        ({"add_bias_linear": False}, False),
        ({"add_bias_linear": False, "openai_gelu": True}, True),
        ({"swiglu": True}, False),
        ({"num_experts": 2}, True),
        ({"num_experts": 2, "moe_grouped_gemm": True}, False),
    ],
)
def test_which_gelu(arguments: dict[str, Any], tanh: bool) -> None:
    assert build_run(sections(**arguments)).model.gelu_tanh is tanh


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_experts": 2, "moe_grouped_gemm": True, "moe_layer_freq": 2},
            "bias_gelu_fusion None: must be False with",
        ),
        ({"num_experts": 2, "moe_router_topk": 1}, "moe_router_pre_softmax None: must be True with moe_router_topk 1"),
        ({"num_experts": 2, "moe_router_load_balancing_type": ["aux_loss", "none"]}, "one value; losses of several"),
        ({"num_experts": 2, "moe_router_load_balancing_type": "quantile"}, "'quantile': must be none or aux_loss"),
        ({"hidden_size": None}, "arguments: lacks hidden_size"),
        ({"norm_epsilon": "small"}, "norm_epsilon 'small': must be a number"),
        ({"swiglu": "yes"}, "swiglu 'yes': must be true or false"),
    ],
)
def test_arguments_that_no_flag_holds(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sections(**arguments)


def test_router_bias_is_refused(tmp_path: Path) -> None:
    """Upstream's routers have a bias where linear layers have one; ours cannot hold it, unless it is 0."""
    stock = dataclasses.replace(models()["sigmoid with biases"], router_bias=True)
    run_ranks(1, save_stock, tmp_path, {"biased": stock}, IDS.tolist())
    foreign = open_megatron(tmp_path / "biased")
    with pytest.raises(UserError, match=r"mlp.router.bias: holds .* so this checkpoint cannot be taken over exactly"):
        check_fills(foreign.blocks, foreign.source)
