"""Checkpoints of other programs, written from nothing: models in plain torch with the names and layouts of Megatron-LM
before megatron-core and of DeepSpeed's experts, computed by those names, and saved as those programs save them.

Nothing here uses the package that is tested.
"""

import argparse
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_moe.config.base import UserError

type Broken = tuple[Callable[[Path], None], str]
"""What breaks a checkpoint, and the line that must say so."""


@dataclass(frozen=True)
class Classic:
    """A model. Its weights have the names of a decoder's state dict, query_key_value as of checkpoint version 3."""

    experts: tuple[int, ...] = (0, 2, 0, 4)
    """Of every layer; 0: dense."""
    hidden: int = 32
    ffn: int = 96
    heads: int = 4
    groups: int = 4
    vocab: int = 120
    positions: int = 32
    residual: bool = False
    network: int = 0
    """Blocks of the expert residual network."""
    second_bias: bool = True
    """Whether experts, and the MLP beside them, add their second bias."""
    topk: int = 1
    tanh: bool = True
    swiglu: bool = False
    bias: bool = True
    rms: bool = False
    rope: bool = False
    untied: bool = False
    eps: float = 1e-5

    @property
    def depth(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    def weights(self, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """Random weights, biases and norms, of numbers that `dtype` holds."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, scale: float = 0.3, around: float = 0.0) -> Tensor:
            return (around + scale * torch.randn(shape, generator=generator)).to(dtype).float()

        w: dict[str, Tensor] = {"word_embeddings.weight": draw(self.vocab, self.hidden)}
        if not self.rope:
            w["position_embeddings.weight"] = draw(self.positions, self.hidden)
        if self.untied:
            w["output_layer.weight"] = draw(self.vocab, self.hidden)

        def norm(name: str) -> None:
            w[f"{name}.weight"] = draw(self.hidden, around=1.0)
            if not self.rms:
                w[f"{name}.bias"] = draw(self.hidden)

        def linear(name: str, out: int, into: int, *, bias: bool | None = None) -> None:
            w[f"{name}.weight"] = draw(out, into, scale=1.0 / math.sqrt(into))
            if self.bias if bias is None else bias:
                w[f"{name}.bias"] = draw(out)

        def mlp(name: str) -> None:
            linear(f"{name}.dense_h_to_4h", self.ffn * (2 if self.swiglu else 1), self.hidden)
            linear(f"{name}.dense_4h_to_h", self.hidden, self.ffn)

        for number, experts in enumerate(self.experts):
            layer = f"layers.{number}"
            norm(f"{layer}.input_layernorm")
            rows = (self.heads + 2 * self.groups) * self.depth
            linear(f"{layer}.self_attention.query_key_value", rows, self.hidden)
            linear(f"{layer}.self_attention.dense", self.hidden, self.hidden)
            norm(f"{layer}.post_attention_layernorm")
            if not experts:
                mlp(f"{layer}.mlp")
                continue
            moe = f"{layer}.mlp.deepspeed_moe"
            # DeepSpeed keeps gates in fp32.
            w[f"{moe}.gate.wg.weight"] = 0.3 * torch.randn(experts, self.hidden, generator=generator)
            for expert in range(experts):
                mlp(f"{moe}.experts.deepspeed_experts.{expert}")
            for block in range(self.network):
                norm(f"{moe}.expert_network.{block}.norm")
                linear(f"{moe}.expert_network.{block}.ff1", 4 * self.hidden, self.hidden)
                linear(f"{moe}.expert_network.{block}.ff2", self.hidden, 4 * self.hidden)
            if self.residual:
                mlp(f"{layer}.mlp.mlp")
                linear(f"{layer}.mlp.coefficient", 2, self.hidden, bias=True)
        norm("final_layernorm")
        return w

    def logits(self, w: dict[str, Tensor], ids: Tensor) -> Tensor:
        """[S, V] of one text [S]."""
        x = w["word_embeddings.weight"][ids]
        if not self.rope:
            x = x + w["position_embeddings.weight"][: len(ids)]
        for number, experts in enumerate(self.experts):
            layer = f"layers.{number}"
            x = x + self._attention(w, layer, self._norm(w, f"{layer}.input_layernorm", x))
            y = self._norm(w, f"{layer}.post_attention_layernorm", x)
            x = x + (self._moe(w, layer, y, experts) if experts else self._mlp(w, f"{layer}.mlp", y))
        x = self._norm(w, "final_layernorm", x)
        return x @ w["output_layer.weight" if self.untied else "word_embeddings.weight"].t()

    def _norm(self, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
        if self.rms:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * w[f"{name}.weight"]
        return F.layer_norm(x, (self.hidden,), w[f"{name}.weight"], w[f"{name}.bias"], self.eps)

    def _attention(self, w: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
        fused = _linear(w, f"{layer}.self_attention.query_key_value", x)
        per_group, length = self.heads // self.groups, len(x)
        parts = fused.view(length, self.groups, per_group + 2, self.depth)
        outputs = []
        mask = torch.full((length, length), -10000.0).triu(1)
        for head in range(self.heads):
            group = head // per_group
            query, key = parts[:, group, head % per_group], parts[:, group, per_group]
            if self.rope:
                query, key = _rotated(query), _rotated(key)
            scores = query @ key.t() / math.sqrt(self.depth) + mask
            outputs.append(scores.softmax(-1) @ parts[:, group, per_group + 1])
        return _linear(w, f"{layer}.self_attention.dense", torch.cat(outputs, dim=-1))

    def _mlp(self, w: dict[str, Tensor], name: str, x: Tensor, *, second_bias: bool = True) -> Tensor:
        y = _linear(w, f"{name}.dense_h_to_4h", x)
        if self.swiglu:
            gate, value = y.chunk(2, dim=-1)
            y = F.silu(gate) * value
        else:
            y = F.gelu(y, approximate="tanh" if self.tanh else "none")
        y = y @ w[f"{name}.dense_4h_to_h.weight"].t()
        return y + w[f"{name}.dense_4h_to_h.bias"] if second_bias and self.bias else y

    def _moe(self, w: dict[str, Tensor], layer: str, x: Tensor, experts: int) -> Tensor:
        moe = f"{layer}.mlp.deepspeed_moe"
        gates = (x @ w[f"{moe}.gate.wg.weight"].t()).softmax(-1)
        chosen = gates.topk(self.topk, dim=-1)
        weights = chosen.values if self.topk == 1 else chosen.values / chosen.values.sum(-1, keepdim=True)
        rows = []
        for token in range(len(x)):
            row = torch.zeros(self.hidden)
            for weight, expert in zip(weights[token], chosen.indices[token].tolist(), strict=True):
                name = f"{moe}.experts.deepspeed_experts.{expert}"
                row = row + weight * self._mlp(w, name, x[token], second_bias=self.second_bias)
            rows.append(row)
        y = torch.stack(rows)
        if self.network:
            z = y
            for number in range(self.network):
                block = f"{moe}.expert_network.{number}"
                normed = F.layer_norm(z, (self.hidden,), w[f"{block}.norm.weight"], w[f"{block}.norm.bias"], 1e-5)
                z = z + _linear(w, f"{block}.ff2", F.relu(_linear(w, f"{block}.ff1", normed)))
            alpha = gates.max(-1, keepdim=True).values
            y = alpha * z + (1 - alpha) * y
        if self.residual:
            share = _linear(w, f"{layer}.mlp.coefficient", x).softmax(-1)
            dense = self._mlp(w, f"{layer}.mlp.mlp", x, second_bias=self.second_bias)
            y = y * share[:, :1] + dense * share[:, 1:]
        return y


def assert_refused(open_it: Callable[[Path], Any], folder: Path, broken: Broken) -> None:
    """A checkpoint that was broken is refused in one line, and nothing in it ran."""
    break_it, message = broken
    break_it(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(UserError, match=message) as error:
            open_it(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "harm-done").exists()


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _rotated(x: Tensor) -> Tensor:
    depth = x.shape[-1]
    speed = 10000.0 ** (-torch.arange(0, depth, 2).float() / depth)
    angle = torch.arange(len(x)).float()[:, None] * speed
    one, other = x[:, : depth // 2], x[:, depth // 2 :]
    return torch.cat((one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin()), dim=-1)


@dataclass(frozen=True)
class Layout:
    """How a program splits and names what it saves."""

    ranks: int = 1
    version: float = 3.0
    split_experts: bool = False
    """Tensor parallelism within experts."""
    older_names: bool = False
    """`transformer` and `attention` in place of `encoder` and `self_attention`."""
    dtype: torch.dtype = torch.float16


def rank_part(model: Classic, name: str, tensor: Tensor, rank: int, layout: Layout) -> Tensor:
    """What a tensor-parallel rank holds of a weight, in its own order of query_key_value."""
    ranks = layout.ranks
    expert = ".deepspeed_experts." in name or ".mlp.mlp." in name
    if "query_key_value" in name:
        part = tensor.chunk(ranks)[rank]
        if layout.version < 2:
            heads = model.heads // ranks
            split = part.view(heads, 3, model.depth, *part.shape[1:])
            split = split.transpose(0, 1) if layout.version == 0 else split.transpose(1, 2)
            part = split.reshape(part.shape)
    elif name in ("word_embeddings.weight", "output_layer.weight"):
        part = tensor.chunk(ranks)[rank]
    elif name.endswith("self_attention.dense.weight"):
        part = tensor.chunk(ranks, dim=1)[rank]
    elif expert and not layout.split_experts:
        part = tensor
    elif "dense_h_to_4h" in name and model.swiglu:
        part = torch.cat([half.chunk(ranks)[rank] for half in tensor.chunk(2)])
    elif "dense_h_to_4h" in name:
        part = tensor.chunk(ranks)[rank]
    elif name.endswith("dense_4h_to_h.weight"):
        part = tensor.chunk(ranks, dim=1)[rank]
    else:
        part = tensor
    return part.to(torch.float32 if "gate.wg" in name else layout.dtype).clone()


def rank_tree(model: Classic, w: dict[str, Tensor], rank: int, layout: Layout) -> dict[str, Any]:
    """The nested state of a rank, without experts."""
    parts = {
        name: rank_part(model, name, tensor, rank, layout)
        for name, tensor in w.items()
        if ".deepspeed_experts." not in name
    }
    embedding = {
        kind: OrderedDict(weight=parts.pop(f"{kind}.weight"))
        for kind in ("word_embeddings", "position_embeddings")
        if f"{kind}.weight" in parts
    }
    tree: dict[str, Any] = {"embedding": embedding}
    if "output_layer.weight" in parts:
        tree["output_layer"] = OrderedDict(weight=parts.pop("output_layer.weight"))
    decoder = OrderedDict(parts)
    if layout.older_names:
        decoder = OrderedDict((name.replace(".self_attention.", ".attention."), t) for name, t in parts.items())
    tree["transformer" if layout.older_names else "encoder"] = decoder
    return {"language_model": tree}


def save_experts(folder: Path, model: Classic, w: dict[str, Tensor], layout: Layout, *, by_layer: bool = True) -> None:
    """A file for each expert of each MoE layer and rank; or, as DeepSpeed did first, for each expert number."""
    moe_layers = [number for number, experts in enumerate(model.experts) if experts]
    for rank in range(layout.ranks):
        content: dict[str, dict[str, Tensor]] = {}
        for name, tensor in w.items():
            if ".deepspeed_experts." not in name:
                continue
            expert, layer = name.split(".deepspeed_experts.")[1].split(".")[0], int(name.split(".")[1])
            start = f"layer_{moe_layers.index(layer)}_" if by_layer else ""
            file = content.setdefault(f"{start}expert_{expert}_mp_rank_{rank:02d}_model_states.pt", {})
            file[f"language_model.encoder.{name}"] = rank_part(model, name, tensor, rank, layout)
        for file_name, tensors in content.items():
            torch.save(tensors, folder / file_name)


def save_pai(folder: Path, model: Classic, w: dict[str, Tensor], layout: Layout, **config: Any) -> Path:
    """A folder of ModelScope's."""
    counts = [experts for experts in model.experts if experts]
    deepspeed = bool(config.get("load_ds_ckpts"))
    fields = {
        "model_type": "gpt-moe",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn,
        "num_hidden_layers": len(model.experts),
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.positions,
        "layernorm_epsilon": model.eps,
        "bias_gelu_fusion": model.tanh,
        "num_experts": counts or [0],
        "use_expert_residual_network": bool(model.network),
        "fp16": True,
        **config,
    }
    (folder / "model").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "configuration.json").write_text(json.dumps({"task": "text-generation", "framework": "pytorch"}))
    for rank in range(layout.ranks):
        path = folder / "model" / f"mp_rank_{rank:02d}"
        path.mkdir()
        tree = {
            "module" if deepspeed else "model": rank_tree(model, w, rank, layout),
            "checkpoint_version": layout.version,
            "iteration": 7,
            "args": argparse.Namespace(num_layers=len(model.experts), params_dtype=torch.half),
            "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
        }
        torch.save(tree, path / ("model_rng.pt" if counts else "model_optim_rng.pt"))
    save_experts(folder / "model", model, w, layout)
    return folder


def save_deepspeed(
    folder: Path, model: Classic, w: dict[str, Tensor], layout: Layout, *, by_layer: bool = True, **arguments: Any
) -> Path:
    """A folder of Megatron-DeepSpeed's."""
    tag = folder / "global_step50"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step50")
    (folder / "latest_checkpointed_iteration.txt").write_text("50")
    counts = [experts for experts in model.experts if experts]
    args = argparse.Namespace(
        **{
            "num_layers": len(model.experts),
            "hidden_size": model.hidden,
            "ffn_hidden_size": model.ffn,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.groups,
            "kv_channels": model.depth,
            "max_position_embeddings": model.positions,
            "seq_length": model.positions,
            "padded_vocab_size": model.vocab,
            "num_experts": counts or [1],
            "expert_interval": 2,
            "mlp_type": "residual" if model.residual else "standard",
            "topk": model.topk,
            "swiglu": model.swiglu,
            "bias_gelu_fusion": model.tanh and not model.swiglu,
            "add_bias_linear": model.bias,
            "normalization": "rmsnorm" if model.rms else "layernorm",
            "layernorm_epsilon": model.eps,
            "use_rotary_position_embeddings": model.rope,
            "add_position_embedding": not model.rope,
            "untie_embeddings_and_output_weights": model.untied,
            "tensor_model_parallel_size": layout.ranks,
            "moe_loss_coeff": 0.01,
            "moe_token_dropping": True,
            "moe_train_capacity_factor": 1.25,
            "params_dtype": layout.dtype,
            "apply_residual_connection_post_layernorm": False,
            **arguments,
        }
    )
    for rank in range(layout.ranks):
        state = {
            "module": rank_tree(model, w, rank, layout),
            "args": args,
            "checkpoint_version": layout.version,
            "iteration": 50,
            "num_experts": counts,
            "dp_world_size": 4,
            "lr_scheduler": None,
        }
        torch.save(state, tag / f"mp_rank_{rank:02d}_model_states.pt")
        torch.save({"optimizer": None}, tag / f"expp_rank_0_mp_rank_{rank:02d}_optim_states.pt")
    save_experts(tag, model, w, layout, by_layer=by_layer)
    return folder
