"""Builds a run's model on the meta device, where parameters have shapes but no memory, and counts them.

What `--dry-run` reports is thus read off the modules that training would build, for models of any size, not off a
formula alone (`parameters.py` is the formula; the two must agree).
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import torch

from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.model.parameters import BuiltCounts
from megatron_moe.runtime import cpu, distributed


def count_on_meta(run: RunConfig) -> BuiltCounts:
    """Parameters of the whole model, as one process would build it.

    Starts and stops process groups of its own; call it before any others are started.

    Raises:
        ConfigError: --vocab-size is not known.
    """
    with model_on_meta(run) as chunk:
        total = experts = routers = 0
        for name, parameter in chunk.named_parameters():
            assert parameter.is_meta
            total += parameter.numel()
            experts += parameter.numel() if ".mlp.experts." in name else 0
            router = ".mlp.router." in name or name.startswith("routing_embedding.")
            routers += parameter.numel() if router else 0
        return BuiltCounts(total=total, experts=experts, router=routers)


@contextlib.contextmanager
def model_on_meta(run: RunConfig) -> Iterator[torch.nn.Module]:
    """The whole model, as one process would build it, in process groups of its own.

    Raises:
        ConfigError: --vocab-size is not known.
    """
    # Neither the dispatcher nor who provides the layers and experts changes a count, but all may need what is not here.
    whole = dataclasses.replace(
        run,
        parallel=ParallelConfig(device="cpu"),
        model=dataclasses.replace(run.model, transformer_impl="local"),
        moe=dataclasses.replace(run.moe, moe_token_dispatcher_type="alltoall", moe_expert_backend="auto"),
    )
    cpu.install()
    distributed.start_alone()
    try:
        yield _build(whole)
    finally:
        distributed.stop()


def _build(run: RunConfig) -> torch.nn.Module:
    from megatron_moe.model.gpt import build_chunk
    from megatron_moe.model.transformer_config import build_transformer_config

    meta = torch.device("meta")
    # The context covers tensors made without a device; megatron-core names the current device for all others.
    with meta, mock.patch.object(torch.cuda, "current_device", return_value=meta):
        return build_chunk(run, build_transformer_config(run), None, initialize=False)
