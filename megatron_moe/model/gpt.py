"""Builds the GPT of a run through megatron-core's `GPTModel`, on the ranks where it belongs."""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

from megatron_moe.config.base import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.model.init import initialize_weights
from megatron_moe.model.specs import block_spec
from megatron_moe.model.transformer_config import PyramidTransformerConfig, build_transformer_config
from megatron_moe.moe import expert_bias
from megatron_moe.runtime import replace

type GptChunk = GPTModel | Float16Module


def build_chunk(
    run: RunConfig, config: PyramidTransformerConfig, vp_stage: int | None, *, initialize: bool
) -> GPTModel:
    """One model chunk of this rank: a pipeline stage, or a virtual stage of it."""
    model = run.model
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, model.attention_backend, vp_stage),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )
    if initialize:
        initialize_weights(chunk, seed=run.training.seed, std=model.init_method_std, num_layers=model.num_layers)
    return chunk


def build_model(run: RunConfig, *, inference: bool = False, initialize: bool = True) -> list[GptChunk]:
    """The chunks of this rank, in compute precision, not yet wrapped for data parallelism.

    Args:
        run: validated flags with a known vocabulary size.
        inference: build for generation and scoring (see `build_transformer_config`).
        initialize: draw the initial weights; not needed when a checkpoint follows.
    """
    if run.moe.moe_token_dispatcher_type == "flex" and not torch.cuda.is_available():
        raise ConfigError("--moe-token-dispatcher-type flex: needs a GPU; there is none here, use alltoall")
    replace.apply([expert_bias.REPLACEMENT])
    config = build_transformer_config(run, inference=inference)
    stages: list[int | None] = list(range(run.virtual_stages or 0)) or [None]
    chunks: list[GptChunk] = []
    for stage in stages:
        chunk = build_chunk(run, config, stage, initialize=initialize)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        half = config.bf16 or config.fp16
        chunks.append(Float16Module(config, chunk) if half else chunk)
    return chunks
