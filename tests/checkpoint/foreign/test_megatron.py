"""Distributed checkpoints of stock GPTModels, written by megatron-core, are read into ours, with the same logits."""

from pathlib import Path

import pytest
import torch

from megatron_moe.checkpoint.foreign.megatron import open_megatron
from tests.helpers.distributed import run_ranks
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
