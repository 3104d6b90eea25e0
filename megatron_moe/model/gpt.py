"""Builds the GPT of a run: megatron-core's `GPTModel`, whose layers also learn which tokens they work on.

Shape legend: B = sequences, S = their tokens on this rank, K = channels of `moe/inputs.py`.
"""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

from megatron_moe.config.base import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.model.init import initialize_weights
from megatron_moe.model.specs import block_spec
from megatron_moe.model.transformer_config import PyramidTransformerConfig, build_transformer_config
from megatron_moe.moe import expert_bias
from megatron_moe.moe.dispatch.choose import make_groups
from megatron_moe.moe.inputs import CHANNELS
from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.routers.base import RouterStart
from megatron_moe.moe.routing_embedding import RoutingEmbedding
from megatron_moe.moe.token_map import read_counts
from megatron_moe.runtime import replace

type GptChunk = PyramidGpt | Float16Module


class DomainEmbedding(LanguageModelEmbedding):
    """Upstream's embedding, with a vector of the token's domain added before dropout (its token types)."""

    domains_BS: torch.Tensor | None = None

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, tokentype_ids: Any = None) -> torch.Tensor:
        """[S, B, H]; on this tensor-parallel rank's part of the sequence under sequence parallelism."""
        assert tokentype_ids is None
        assert self.domains_BS is not None
        return super().forward(input_ids, position_ids, self.domains_BS)


class PyramidGpt(GPTModel):
    """`GPTModel` that hands the routing inputs to its layers, on every pipeline stage.

    `forward(..., padding_mask=)` takes them, [B, S, K] as `moe/inputs.py` packs them: the argument reaches every layer,
    and through every kind of recompute, by upstream's own code (`models/gpt/gpt_model.py:GPTModel.forward`,
    `recompute.py:checkpointed_forward`, `transformer_layer.py:TransformerLayer._forward_mlp`).
    """

    def __init__(self, *args: Any, domain_embedding: bool = False, **kwargs: Any) -> None:
        self._adds_domains = domain_embedding
        super().__init__(*args, **kwargs)
        self.routing_embedding: RoutingEmbedding | None = None
        config = self.config
        if config.has_cond_embedder:
            stages = self.pg_collection.pp
            chunk = stages.rank() + (self.vp_stage or 0) * stages.size()
            self.routing_embedding = RoutingEmbedding(config, {n for n in config.experts_per_layer if n}, chunk)
            for layer in moe_layers(self):
                layer.router.share(self.routing_embedding)

    def setup_embeddings_and_output_layer(self) -> None:
        """Upstream's, called when all parts are there; the embedding is replaced before it is shared with others."""
        if self._adds_domains and self.pre_process:
            self.embedding = DomainEmbedding(
                config=self.config,
                vocab_size=self.vocab_size,
                max_sequence_length=self.max_sequence_length,
                position_embedding_type=self.position_embedding_type,
                num_tokentypes=self.config.domains,
                tp_group=self.pg_collection.tp,
            )
        super().setup_embeddings_and_output_layer()

    def _preprocess(self, *args: Any, padding_mask: torch.Tensor | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """Upstream's, and this tensor-parallel rank's part of the routing inputs.

        Upstream cuts a padding mask up on the first pipeline stage only, and wants it to have no channels.
        """
        if self._adds_domains and self.pre_process:
            assert padding_mask is not None
            self.embedding.domains_BS = padding_mask[..., CHANNELS.index("domain")]
        outputs = super()._preprocess(*args, padding_mask=None, **kwargs)
        if padding_mask is None:
            return outputs
        inputs_BSK = padding_mask
        if self.config.sequence_parallel:
            group = self.pg_collection.tp
            inputs_BSK = inputs_BSK.chunk(group.size(), dim=1)[group.rank()]
        return (*outputs[:5], inputs_BSK, *outputs[6:])


def build_chunk(
    run: RunConfig, config: PyramidTransformerConfig, vp_stage: int | None, *, initialize: bool
) -> PyramidGpt:
    """One model chunk of this rank: a pipeline stage, or a virtual stage of it."""
    model = run.model
    chunk = PyramidGpt(
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
        rope_scaling=model.use_rope_scaling,
        rope_scaling_factor=model.rope_scaling_factor,
        vp_stage=vp_stage,
        domain_embedding=model.domain_embedding,
    )
    if initialize:
        initialize_weights(chunk, seed=run.training.seed, std=model.init_method_std, num_layers=model.num_layers)
        start = RouterStart(run.training.seed, model.padded_vocab_size, _token_counts(run))
        for layer in moe_layers(chunk):
            layer.router.start_run(start)
    return chunk


def _token_counts(run: RunConfig) -> torch.Tensor | None:
    file = run.routing.router_token_counts
    if file is None:
        return None
    domains = run.model.num_domains if run.moe.router == "random-routed" else None
    return read_counts(file, run.model.padded_vocab_size, domains)


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
    make_groups(config, get_default_pg_collection())
    stages: list[int | None] = list(range(run.virtual_stages or 0)) or [None]
    chunks: list[GptChunk] = []
    for stage in stages:
        chunk = build_chunk(run, config, stage, initialize=initialize)
        if torch.cuda.is_available():
            chunk.cuda(torch.cuda.current_device())
        half = config.bf16 or config.fp16
        chunks.append(Float16Module(config, chunk) if half else chunk)
    return chunks
