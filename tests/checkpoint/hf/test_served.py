"""What stands in the way of programs that serve exports: as found with vLLM and llama.cpp, and as cards say it."""

from typing import Any

import pytest

from megatron_moe.checkpoint.hf.served import served_by
from megatron_moe.checkpoint.hf.targets import choose_hf_target
from megatron_moe.config.run import RunConfig
from tests.helpers.tiny import tiny_run

LLAMA_LIKE: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "disable_bias_linear": True,
    "mlp_type": "standard",
    "num_experts": (4,),
    "expert_interval": 1,
    "vocab_size": 860,
}


def answers(**flags: Any) -> tuple[str, dict[str, str]]:
    run: RunConfig = tiny_run(**LLAMA_LIKE | flags)
    model_type = choose_hf_target(run).family.model_type
    return model_type, dict(served_by(run, model_type))


@pytest.mark.parametrize(
    ("flags", "model_type", "program", "answer"),
    [
        ({"moe_router_topk": 2}, "mixtral", "vLLM", "yes"),
        ({"moe_router_topk": 2}, "mixtral", "llama.cpp", "yes"),
        ({"moe_router_topk": 1}, "qwen2_moe", "llama.cpp", "yes, but its converter"),
        ({"moe_router_topk": 2, "add_qkv_bias": True}, "qwen2_moe", "llama.cpp", "no: takes it for granted"),
        ({"moe_router_topk": 2, "add_qkv_bias": True}, "qwen2_moe", "vLLM", "yes"),
        ({"moe_router_topk": 1, "expert_interval": 2}, "qwen2_moe", "llama.cpp", "no: its converter knows no dense"),
        ({"moe_router_topk": 1, "kv_channels": 16}, "qwen2_moe", "vLLM", "no: takes heads"),
        ({"moe_router_topk": 2, "kv_channels": 16}, "mixtral", "vLLM", "yes"),
        ({"moe_router_topk": 2, "qk_layernorm": True}, "qwen3_moe", "llama.cpp", "yes, but its converter"),
        ({"moe_router_topk": 1, "qk_layernorm": True}, "qwen3_moe", "llama.cpp", "no: takes it for granted"),
        ({"num_experts": (4, 8), "expert_interval": 2}, "megatron_moe", "llama.cpp", "no: it runs no code"),
    ],
)
def test_what_stands_in_the_way(flags: dict[str, Any], model_type: str, program: str, answer: str) -> None:
    found, programs = answers(**flags)
    assert found == model_type
    assert programs[program].startswith(answer)
