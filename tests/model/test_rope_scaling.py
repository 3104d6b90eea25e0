"""`--use-rope-scaling`: Llama 3.1's rotary frequencies, against transformers' own."""

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_moe.config.run import RunConfig
from megatron_moe.model.dry_run import report
from tests.helpers.distributed import run_ranks
from tests.helpers.models import start_model
from tests.helpers.tiny import tiny_run

# 64 channels and Llama's base: fast, slow, and two that are mixed.
ROPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_attention_heads": 1,
    "position_embedding_type": "rope",
    "rotary_base": 500_000,
    "num_experts": None,
    "expert_interval": 1,
    "mlp_type": "standard",
}


def frequencies(runs: list[RunConfig]) -> list[Tensor]:
    from megatron_moe.model.gpt import build_model

    start_model(runs[0])
    return [build_model(run)[0].rotary_pos_emb.inv_freq for run in runs]


def test_frequencies_are_those_of_transformers() -> None:
    plain = tiny_run(**ROPE)
    factors = (8.0, 32.0)
    scaled = [tiny_run(**ROPE, use_rope_scaling=True, rope_scaling_factor=factor) for factor in factors]
    unscaled, *found = run_ranks(1, frequencies, [plain, *scaled])[0]
    for factor, ours in zip(factors, found, strict=True):
        rope = {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_parameters=rope)
        theirs, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        assert attention_factor == 1.0
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)
        changed = (ours / unscaled).tolist()
        assert changed[0] == 1.0
        assert changed[-1] == 1.0 / factor
        assert any(1.0 / factor < ratio < 1.0 for ratio in changed)


def test_the_dry_run_names_it() -> None:
    run = tiny_run(**ROPE, use_rope_scaling=True)
    assert "rope (scaled by 8) positions" in report(run, 1)
