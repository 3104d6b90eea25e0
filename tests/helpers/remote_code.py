"""Our model and the class that travels with its checkpoint, on the same weights and tables, folders in between."""

import dataclasses
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.convert.blocks import Block, Side, whole
from megatron_moe.checkpoint.convert.coverage import check_coverage
from megatron_moe.checkpoint.convert.engine import Targets, assemble, target_infos
from megatron_moe.checkpoint.hf.remote.family import FAMILY, copy_code
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run
from tests.helpers.hf_parity import LENGTH, VOCABULARY, MemorySource, Ours, real_ids
from tests.helpers.tiny import tiny_run

DOMAINS = {"num_domains": 3, "domain_names": ("news", "novel", "forum")}
SMALL: dict[str, Any] = {"hidden_size": 32, "seq_length": LENGTH, "vocab_size": VOCABULARY}
HUNYUAN: dict[str, Any] = {
    "num_query_groups": 2,
    "kv_channels": 12,
    "ffn_hidden_size": 40,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "expert_interval": 1,
    "mlp_type": "standard",
    "num_experts": (4,),
    "moe_ffn_hidden_size": 24,
}

CASES: dict[str, dict[str, Any]] = {
    # PR-MoE and PAI's GPT-MoE: GELU, LayerNorm, biases, learned positions, tied; experts in every second layer.
    "pyramid residual": {},
    "residual added, untied": {"residual_combine": "add", "untie_embeddings_and_output_weights": True},
    "expert residual network": {"use_expert_residual_network": True, "expert_residual_layers": 2},
    "experts of their own width": {
        "ffn_hidden_size": 48,
        "moe_ffn_hidden_size": 20,
        "moe_router_topk": 2,
        "moe_expert_dropout": 0.1,
    },
    # Hunyuan-Large: grouped queries, keys and values shared by pairs of layers, a norm on them, a shared expert.
    "hunyuan-large": {
        **HUNYUAN,
        "qk_layernorm": True,
        "cla_share_factor": 2,
        "moe_shared_expert_intermediate_size": 36,
        "router": "recycle",
        "moe_expert_capacity_factor": 1.0,
    },
    "shared by three, no norm": {**HUNYUAN, "num_layers": 5, "cla_share_factor": 3, "add_qkv_bias": True},
    "projection norm, shared": {
        **HUNYUAN,
        "qk_layernorm": True,
        "qk_layernorm_type": "projection",
        "cla_share_factor": 2,
    },
    "norm and gated shared expert": {
        **HUNYUAN,
        "qk_layernorm": True,
        "rotary_percent": 0.5,
        "moe_shared_expert_intermediate_size": 36,
        "moe_shared_expert_gate": True,
        "moe_router_topk": 2,
        "untie_embeddings_and_output_weights": True,
    },
    "stretched rotation": {**HUNYUAN, "use_rope_scaling": True, "rope_scaling_factor": 4.0, "rotary_base": 500000},
    "sigmoid and bias": {
        **HUNYUAN,
        "num_experts": (8, 4, 8, 4),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk": 2,
        "moe_router_topk_scaling_factor": 1.7,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
    "groups of softmax scores": {
        **HUNYUAN,
        "num_experts": (8,),
        "moe_router_topk": 4,
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 0.5,
        "moe_router_dtype": "fp64",
    },
    "sinkhorn, squared relu": {
        "moe_router_load_balancing_type": "sinkhorn",
        "moe_aux_loss_coeff": 0.0,
        "squared_relu": True,
        "position_embedding_type": "none",
    },
    "sinkhorn of two": {
        **HUNYUAN,
        "moe_router_load_balancing_type": "sinkhorn",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_topk": 2,
    },
    "large margin": {"router": "large-margin", "moe_router_topk": 2},
    "cosines of a large margin": {
        "router": "large-margin",
        "router_margin_type": "additive",
        "router_margin_scale": 6.0,
    },
    # PanGu-Sigma: the domain decides on the group of experts.
    "pangu-sigma": {
        **DOMAINS,
        "domain_embedding": True,
        "router": "random-routed",
        "num_experts": (8,),
        "router_domain_shares": (1, 2, 1),
        "mlp_type": "standard",
        "moe_first_dense_layers": 2,
    },
    "domain embedding": {**DOMAINS, "domain_embedding": True, "gelu_tanh": True},
    "hash": {"router": "hash", "moe_router_topk": 2},
    "token embedding": {"router": "token-embedding", "router_embedding_size": 12, "moe_router_topk": 2},
    "token embedding of each layer": {
        "router": "token-embedding",
        "router_embedding_shared": False,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "base": {"router": "base"},
    "expert choice": {"router": "expert-choice", "use_expert_residual_network": True, "expert_residual_layers": 1},
    # DeepSeek's attention with what its class has not.
    "latent pyramid": {
        "multi_latent_attention": True,
        "position_embedding_type": "rope",
        "q_lora_rank": 20,
        "kv_lora_rank": 12,
        "qk_head_dim": 10,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
        "qk_layernorm": True,
        "rotary_scaling_factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    },
    "latent without norms": {
        "multi_latent_attention": True,
        "position_embedding_type": "rope",
        "kv_lora_rank": 12,
        "qk_head_dim": 6,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 10,
        "normalization": "RMSNorm",
        "disable_bias_linear": True,
        "router": "hash",
    },
    "dense": {"num_experts": None, "expert_interval": 1, "mlp_type": "standard", "squared_relu": True},
}
"""Every feature at least once; no case's other sizes are alike, so that nothing fits by accident."""


def case(name: str) -> RunConfig:
    """The run of a case."""
    return tiny_run(**(SMALL | CASES[name]))


@cache
def domains_of_rows() -> Tensor:
    """[B, S]: the domain changes within the rows."""
    rows, length = real_ids().shape
    return (torch.arange(rows)[:, None] + torch.arange(length) // 20) % 3


class OurModel(Ours):
    """With tables of integers, and texts of domains."""

    def randomise(self, seed: int = 0) -> "OurModel":
        """As the base, and steps that cutoffs were learned from."""
        super().randomise(seed)
        for name, tensor in self.chunk.named_buffers():
            if name.endswith("cutoff_steps"):
                tensor.fill_(17)
        return self

    def _integers(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.chunk.named_buffers() if name.endswith(("token_map", "_steps"))}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of the whole tensors by their canonical names."""
        return super().tensors() | {name: tensor.clone() for name, tensor in self._integers().items()}

    def load(self, whole: Mapping[str, Tensor]) -> "OurModel":
        """Take over all weights and tables."""
        integers = self._integers()
        super().load({name: tensor for name, tensor in whole.items() if name not in integers})
        for name, tensor in integers.items():
            tensor.copy_(whole[name])
        return self

    @torch.no_grad()
    def logits(self, ids_BS: Tensor | None = None, domains_BS: Tensor | None = None) -> Tensor:
        """[B, S, V] without the rows that only pad the tables."""
        return self.logits_with_gradient(real_ids() if ids_BS is None else ids_BS, domains_BS)

    def logits_with_gradient(self, ids_BS: Tensor, domains_BS: Tensor | None = None) -> Tensor:
        """The same, to learn from."""
        from megatron_moe.moe.inputs import pack_inputs

        positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        inputs = pack_inputs(ids_BS, torch.arange(len(ids_BS)), domains_BS=domains_BS)
        output = self.chunk(ids_BS, positions_BS, None, padding_mask=inputs, runtime_gather_output=True)
        return output[..., : self.run.model.vocab_size].float()


def domains_for(run: RunConfig) -> Tensor | None:
    """Domains of the real text, for models that know domains."""
    return None if run.model.num_domains is None else domains_of_rows()


def converted(blocks: list[Block], side: Side, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All tensors of `side`, by the product's own engine."""
    reader = MemorySource(source)
    infos, targets = target_infos(blocks, side, reader.infos), Targets(blocks, side)
    sides = (infos, reader.infos) if side == "ours" else (reader.infos, infos)
    check_coverage(blocks, *sides)
    return {name: assemble(targets, whole(name, info.shape), reader, info.dtype) for name, info in infos.items()}


def write_folder(run: RunConfig, tensors: Mapping[str, Tensor], folder: Path) -> Path:
    """A folder as `to-hf` writes it: code, config.json and weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    copy_code(folder)
    config = {"architectures": [FAMILY.architecture], "model_type": FAMILY.model_type, **FAMILY.config(run)}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@dataclasses.dataclass(frozen=True)
class Exported:
    """A random model of ours and its folder."""

    run: RunConfig
    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]
    folder: Path
    logits: Tensor


def export(run: RunConfig, folder: Path, seed: int = 0) -> Exported:
    """Write a model with random weights; a process group must be there."""
    model = OurModel(run).randomise(seed)
    ours = model.tensors()
    theirs = converted(FAMILY.blocks(run), "theirs", ours)
    write_folder(run, theirs, folder)
    return Exported(run, ours, theirs, folder, model.logits(domains_BS=domains_for(run)))


def load(folder: Path, **options: Any) -> Any:
    """The folder's model as a user loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def imported(folder: Path) -> RunConfig:
    """The run that the folder's config.json describes."""
    flags = FAMILY.flags(json.loads((folder / "config.json").read_text()))
    return build_run(flags, {"parallel": {"device": "cpu"}, "training": {"train_iters": 1}})


class _Bytes:
    """What generation asks of a tokenizer; nothing ends a document."""

    vocab_size, eod = VOCABULARY, -1


def our_greedy(model: OurModel, prompts: list[list[int]], count: int, domains: list[int] | None = None) -> Tensor:
    """[B, count]: the tokens that our own generation adds to prompts, with its cache."""
    from megatron_moe.inference.generation import generate
    from megatron_moe.inference.model import InferenceModel
    from megatron_moe.inference.options import SamplingOptions
    from megatron_moe.inference.saved_model import SavedModel

    saved = SavedModel(Path(), model.run, _Bytes())  # type: ignore[arg-type]
    done = generate(
        InferenceModel(saved, model.chunk), prompts, SamplingOptions(greedy=True), max_new_tokens=count, domains=domains
    )
    return torch.tensor([one.ids for one in done])
