"""Arguments of Megatron-LM that change what a model computes and have no flag of ours: each is refused by its name."""

from typing import Any

import pytest

from megatron_moe.checkpoint.foreign.megatron_args import megatron_sections
from megatron_moe.checkpoint.foreign.settings import Settings
from megatron_moe.config.base import UserError

PLAIN: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": 16}
# With the value that changes nothing.
CHANGING: list[tuple[str, Any, Any]] = [
    ("moe_mlp_glu_interleave_size", 32, None),
    ("moe_shared_expert_glu_interleave_size", 32, None),
    ("use_mup", True, False),
    ("mup_embedding_mult", 10.0, 1.0),
    ("mup_output_mult", 0.5, 1.0),
    ("softmax_scale", 0.1, None),
    ("qk_l2_norm", True, False),
    ("window_size", (128, 0), None),
]


@pytest.mark.parametrize(("name", "value", "neutral"), CHANGING, ids=[name for name, *_ in CHANGING])
def test_what_our_model_does_not_compute_is_refused(name: str, value: Any, neutral: Any) -> None:
    with pytest.raises(UserError, match=rf"arguments: {name} .*: must be "):
        megatron_sections(Settings({**PLAIN, name: value}, "arguments"), 64)
    assert megatron_sections(Settings({**PLAIN, name: neutral}, "arguments"), 64)["model"]["num_layers"] == 2
