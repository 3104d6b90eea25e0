"""What the tests of conversion share: runs of both kinds of checkpoints, and checkpoints of weights alone."""

from pathlib import Path
from typing import Any

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run
from tests.helpers.tiny import tiny_run


def moe_run(**flags: Any) -> RunConfig:
    """Dense layers and pyramid layers with residual MLPs, gated; layers are in the names."""
    return tiny_run(vocab_size=100, swiglu=True, **flags)


def dense_run(**flags: Any) -> RunConfig:
    """A Llama; its checkpoints stack the layers."""
    model = {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 100,
        "seq_length": 32,
        "swiglu": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "disable_bias_linear": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    training = {"micro_batch_size": 1, "global_batch_size": 4, "train_iters": 1, "eval_interval": 0} | {
        name: value for name, value in flags.items() if name in ("bf16", "fp16")
    }
    parallel = {"device": "cpu"} | {name: value for name, value in flags.items() if name.endswith("parallel_size")}
    return build_run({"model": model, "training": training, "parallel": parallel})


def save_weights(run: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    """On a rank: save a perturbed model as training does, without an optimizer. Returns what this rank holds by key,
    where it holds it whole."""
    from megatron.core import dist_checkpointing

    from megatron_moe.checkpoint.optimizer_state import METADATA
    from megatron_moe.checkpoint.save import REPLACEMENTS
    from megatron_moe.checkpoint.state import model_state
    from megatron_moe.runtime import replace
    from tests.helpers.models import start_model

    model = start_model(run, perturbed=True)
    replace.apply(REPLACEMENTS)
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save({**model_state(model), "progress": {"step": 0}}, str(folder), content_metadata=METADATA)
    return {name: value.detach().clone() for name, value in model[0].state_dict().items() if value is not None}


def plain_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """On a rank of its own: every tensor of a checkpoint folder by key, as megatron-core reads it."""
    from megatron.core import dist_checkpointing

    from megatron_moe.checkpoint import safe_reader
    from megatron_moe.config.parallel import ParallelConfig
    from megatron_moe.runtime import replace
    from megatron_moe.runtime.distributed import start

    start(ParallelConfig(device="cpu"))
    replace.apply(safe_reader.REPLACEMENTS)
    state = dist_checkpointing.load_plain_tensors(str(folder))
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
