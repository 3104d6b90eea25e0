"""Stock models of megatron-core, saved by megatron-core, with the arguments that Megatron-LM would save beside them."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Stock:
    """A `GPTModel` of upstream's own layer specs."""

    config: dict[str, Any] = field(default_factory=dict)
    """Fields of `TransformerConfig`."""
    model: dict[str, Any] = field(default_factory=dict)
    """Arguments of `GPTModel`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Megatron-LM's arguments that make this model, beside those for sizes."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Of the sharded state."""
    by_ranks: bool = False
    """A file for each rank instead of a distributed checkpoint."""
    router_bias: bool = False
    """Whether routers' biases are anything but 0."""
    legacy_common: bool = False
    """What ranks share in common.pt, as before megatron-core 0.17."""


HIDDEN, HEADS, LAYERS, VOCAB, POSITIONS = 32, 4, 2, 120, 32


def save_stock(folder: Path, models: dict[str, Stock], ids: list[int], tensor_size: int = 1) -> dict[str, torch.Tensor]:
    """Runs on ranks of its own: build, spoil and save each model, and return this rank's part of its logits."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.common import save_common

    from megatron_moe.checkpoint.save import REPLACEMENTS
    from megatron_moe.config.yaml_io import build_run
    from megatron_moe.runtime import replace
    from megatron_moe.runtime.distributed import start
    from megatron_moe.runtime.seeds import set_seeds

    flags = {"model": {"vocab_size": 128}, "parallel": {"tensor_model_parallel_size": tensor_size}}
    run = build_run(flags)
    start(run.parallel, run.virtual_stages)
    replace.apply(REPLACEMENTS)
    torch.set_grad_enabled(False)
    logits = {}
    for number, (name, stock) in enumerate(models.items()):
        set_seeds(number)
        chunk = _build(stock, tensor_size)
        state: dict[str, Any] = {"model": chunk.sharded_state_dict(metadata=stock.metadata)}
        _spoil(state, number, stock.router_bias)
        common = {"args": _arguments(stock), "checkpoint_version": 3.0, "iteration": 5, "content_metadata": {}}
        target = folder / name / "iter_0000005"
        target.mkdir(parents=True, exist_ok=True)
        (folder / name / "latest_checkpointed_iteration.txt").write_text("5")
        logits[name] = _logits(chunk, ids)
        if stock.by_ranks:
            vars(common["args"]).update(tensor_model_parallel_size=tensor_size, pipeline_model_parallel_size=1)
            rank = target / f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
            rank.mkdir()
            torch.save({"model": chunk.state_dict_for_save_checkpoint(), **common}, rank / "model_optim_rng.pt")
            continue
        if stock.legacy_common:
            save_common(common, str(target))
        dist_checkpointing.save(state if stock.legacy_common else {**state, **common}, str(target))
    return logits


def _logits(chunk: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    tokens, positions = torch.tensor(ids)[None], torch.arange(len(ids))[None]
    hidden_from = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)[None, None]
    output: torch.Tensor = chunk(input_ids=tokens, position_ids=positions, attention_mask=hidden_from)
    return output[0].float()


def _build(stock: Stock, tensor_size: int) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tensor_size,
        **stock.config,
    )
    spec: Any = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    if config.num_moe_experts:
        spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    chunk = GPTModel(config, spec, vocab_size=VOCAB, max_sequence_length=POSITIONS, parallel_output=True, **stock.model)
    return chunk.eval()


def _spoil(state: dict[str, Any], seed: int, router_bias: bool) -> None:
    """Move every weight, norm and bias off where it began; copies on several ranks alike."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_moe.model import init

    for entry in init._leaves(state["model"]):
        for part in init._leaves(entry.build()) if hasattr(entry, "build") else [entry]:
            if isinstance(part, ShardedTensor) and part.data.is_floating_point():
                if part.key.endswith("router.bias") and not router_bias:
                    part.data.zero_()
                    continue
                part.data.add_(init._draw(part, seed).to(part.data.dtype), alpha=0.1)


def _arguments(stock: Stock) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "ffn_hidden_size": 4 * HIDDEN,
            "num_attention_heads": HEADS,
            "kv_channels": HIDDEN // HEADS,
            "group_query_attention": False,
            "num_query_groups": 1,
            "max_position_embeddings": POSITIONS,
            "seq_length": POSITIONS,
            "position_embedding_type": "learned_absolute",
            "normalization": "LayerNorm",
            "norm_epsilon": 1e-5,
            "swiglu": False,
            "bias_gelu_fusion": False,
            "add_bias_linear": True,
            "untie_embeddings_and_output_weights": False,
            "qk_layernorm": False,
            "num_experts": None,
            "moe_router_topk": 2,
            "padded_vocab_size": VOCAB,
            "params_dtype": torch.float32,
            "data_path": ["a_text_document"],
            "rampup_batch_size": None,
            **stock.arguments,
        }
    )
