"""A model that megatron_moe trained, for transformers. Copied into the checkpoint's folder; stands by itself.

It computes what megatron_moe computes when it generates: tokens are never dropped, margins and noise are gone. Each
layer has its own number of experts. A checkpoint that lacks a tensor, or has one too many, is an error.

Shape legend: B = sequences, S = tokens of each, N = B * S tokens, H = hidden size, D = head width, G = key/value heads,
T = keys with those of the cache, E = experts of a layer, K = experts of a token, R = rows that experts work on,
V = token ids.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_megatron_moe import MegatronMoeConfig

# Of Llama 3.1: between these wavelengths, as parts of the length it was first trained on, frequencies are mixed.
LLAMA3_LENGTH, LLAMA3_LOW, LLAMA3_HIGH = 8192, 1.0, 4.0
# A block of the expert residual network is this much wider than the hidden size.
EXPERT_RESIDUAL_EXPANSION = 4
EPSILON = 1e-10
DTYPES = {"float32": torch.float32, "float64": torch.float64}
FIXED_ROUTERS = ("hash", "random-routed")
# What versions of transformers 5 call these, and ask for.
MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)
CACHE_TAKES_PLACES = "cache_kwargs" in inspect.signature(Cache.update).parameters
# Routers whose logits are balanced by the auxiliary loss.
BALANCED_ROUTERS = ("topk", "large-margin", "recycle", "token-embedding")


# ---- norms, positions, attention


def build_norm(config: MegatronMoeConfig, size: int) -> nn.Module:
    """The model's norm over the last dimension."""
    kind = nn.RMSNorm if config.norm_type == "rmsnorm" else nn.LayerNorm
    return kind(size, eps=config.norm_eps)


def rotary_frequencies(config: MegatronMoeConfig, device: torch.device) -> Tensor:
    """Of each pair of rotated channels."""
    latent = config.kv_lora_rank is not None
    width = config.qk_rope_head_dim if latent else int(config.head_dim * config.rotary_percent)
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    frequencies = 1.0 / (config.rotary_base ** (steps / width))
    if config.rotary_yarn is not None:
        return yarn_frequencies(config, config.rotary_yarn, frequencies, width)
    factor = config.rotary_scaling_factor
    if factor is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    longest, shortest = LLAMA3_LENGTH / LLAMA3_LOW, LLAMA3_LENGTH / LLAMA3_HIGH
    stretched = torch.where(wavelengths > longest, frequencies / factor, frequencies)
    mix = (LLAMA3_LENGTH / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, (1 - mix) * stretched / factor + mix * stretched, stretched)


def yarn_frequencies(config: MegatronMoeConfig, yarn: dict[str, float], frequencies: Tensor, width: int) -> Tensor:
    """YaRN (arXiv 2309.00071): fast frequencies stay, slow ones are stretched, those between are mixed."""

    def channel(turns: float) -> float:
        """The pair of channels that turns this often in a text of the length the model first saw."""
        length = yarn["original_max_position_embeddings"]
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))

    low = max(math.floor(channel(yarn["beta_fast"])), 0)
    high: float = min(math.ceil(channel(yarn["beta_slow"])), width - 1)
    if low == high:
        high += 0.001
    places = torch.arange(width // 2, dtype=torch.float32, device=frequencies.device)
    stays = 1.0 - ((places - low) / (high - low)).clamp(0, 1)
    return frequencies / yarn["factor"] * (1 - stays) + frequencies * stays


def yarn_scale(config: MegatronMoeConfig, name: str) -> float:
    """By how much YaRN's `mscale` or `mscale_all_dim` enlarges; 1 without it."""
    yarn = config.rotary_yarn
    return 1.0 if yarn is None or yarn["factor"] <= 1 else 0.1 * yarn[name] * math.log(yarn["factor"]) + 1.0


def rotary_tables(config: MegatronMoeConfig, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, S, rotated channels], fp32."""
    angles = positions_BS[..., None].float() * rotary_frequencies(config, positions_BS.device)
    angles = torch.cat((angles, angles), dim=-1)
    size = yarn_scale(config, "mscale") / yarn_scale(config, "mscale_all_dim")
    return angles.cos() * size, angles.sin() * size


def rotate(x_BHSD: Tensor, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    """Rotate the first channels of every head; None: positions do not enter here."""
    if tables is None:
        return x_BHSD
    cos, sin = (table[:, None].to(x_BHSD.dtype) for table in tables)
    width = cos.shape[-1]
    turned, rest = x_BHSD[..., :width], x_BHSD[..., width:]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((turned, rest), dim=-1)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; `attention_mask` is added to the scores."""
    groups: Any = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def causal_mask(
    config: MegatronMoeConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    position_ids: Tensor,
    places_S: Tensor,
) -> Any:
    """The mask for the implementation that the config names; None where it is implied."""
    given = {"inputs_embeds": inputs_embeds, "input_embeds": inputs_embeds, "cache_position": places_S}
    return create_causal_mask(
        config=config,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        **{name: value for name, value in given.items() if name in MASK_ARGUMENTS},
    )


def cached(cache: Cache, key: Tensor, value: Tensor, layer_idx: int, places_S: Tensor) -> tuple[Tensor, Tensor]:
    """Put a layer's keys and values into the cache; all that it holds now."""
    if CACHE_TAKES_PLACES:
        return cache.update(key, value, layer_idx, {"cache_position": places_S})
    return cache.update(key, value, layer_idx)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention by the implementation that the config names: [B, S, heads, D of a value], and weights if it has any."""
    kind = module.config._attn_implementation
    width = value.shape[-1]
    if "flash" in kind and width < query.shape[-1]:
        # Its kernels take heads of one width only.
        value = F.pad(value, (0, query.shape[-1] - width))
    interface: Callable[..., Any] = eager_attention if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
    dropout = module.attention_dropout if module.training else 0.0
    output, weights = interface(
        module, query, key, value, attention_mask, dropout=dropout, scaling=module.scaling, **kwargs
    )
    return output[..., :width], weights


class MegatronMoeAttention(nn.Module):
    """Causal attention. With shared keys and values (`kv_share_factor`) a layer has a query projection only, or leaves
    its keys, without norm and rotation, and values to the layers after it; each of them norms and rotates the keys
    itself."""

    def __init__(self, config: MegatronMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.shares = config.kv_share_factor > 1
        self.has_keys = layer_idx % config.kv_share_factor == 0
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        hidden, bias = config.hidden_size, config.attention_bias
        queries, keys = (heads * self.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        if self.has_keys:
            self.k_proj = nn.Linear(hidden, keys, bias=bias)
            self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=config.linear_bias)
        if config.qk_norm is not None:
            whole = config.qk_norm == "projection"
            self.q_norm = build_norm(config, queries if whole else self.head_dim)
            self.k_norm = build_norm(config, keys if whole else self.head_dim)

    def forward(
        self,
        hidden_BSH: Tensor,
        shared_keys: Tensor | None,
        shared_values: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None,
        places_S: Tensor,
        first_positions: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Output [B, S, H]; keys and values for the layers after it; attention weights where they are computed."""
        query = rotate(self._normed("q_norm", self._heads(self.q_proj(hidden_BSH))), position_embeddings)
        if self.has_keys:
            key, value = self._heads(self.k_proj(hidden_BSH)), self._heads(self.v_proj(hidden_BSH))
            if not self.shares:
                key = rotate(self._normed("k_norm", key), position_embeddings)
            if past_key_values is not None:
                key, value = cached(past_key_values, key, value, self.layer_idx, places_S)
            if self.shares:
                shared_keys, shared_values = key, value
        else:
            assert shared_keys is not None
            assert shared_values is not None
            key, value = shared_keys, shared_values
        if self.shares:
            tables = self._key_tables(key.shape[2], position_ids, position_embeddings, first_positions)
            key = rotate(self._normed("k_norm", key), tables)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        output = self.o_proj(output.reshape(*hidden_BSH.shape[:2], -1))
        return output, shared_keys, shared_values, weights

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads * D] as [B, heads, S, D]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _normed(self, name: str, x_BHSD: Tensor) -> Tensor:
        if self.config.qk_norm is None:
            return x_BHSD
        norm = getattr(self, name)
        if self.config.qk_norm == "head":
            normed: Tensor = norm(x_BHSD)
            return normed
        return self._heads(norm(x_BHSD.transpose(1, 2).flatten(2)))

    def _key_tables(
        self,
        length: int,
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        first_positions: Tensor,
    ) -> tuple[Tensor, Tensor] | None:
        """Rotation of all T keys: those of the cache come without a gap before the tokens at hand."""
        if position_embeddings is None or length == position_ids.shape[1]:
            return position_embeddings
        positions = torch.arange(length, device=position_ids.device) + first_positions
        return rotary_tables(self.config, positions.clamp(min=0))


class MegatronMoeLatentAttention(nn.Module):
    """Multi-latent attention (DeepSeek-V2): keys and values of all heads come from one small vector of the token, and
    from a small rotated key that all heads share."""

    def __init__(self, config: MegatronMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = 1
        self.plain, self.rotated, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.scaling = yarn_scale(config, "mscale_all_dim") ** 2 * (self.plain + self.rotated) ** -0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        hidden, heads, rank, latent = (
            config.hidden_size,
            config.num_attention_heads,
            config.q_lora_rank,
            config.kv_lora_rank or 0,
        )
        queries, normed = heads * (self.plain + self.rotated), config.qk_norm is not None
        if rank is None:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, rank, bias=False)
            self.q_a_layernorm = build_norm(config, rank) if normed else nn.Identity()
            self.q_b_proj = nn.Linear(rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, latent + self.rotated, bias=False)
        self.kv_a_layernorm = build_norm(config, latent) if normed else nn.Identity()
        self.kv_b_proj = nn.Linear(latent, heads * (self.plain + self.value), bias=False)
        self.o_proj = nn.Linear(heads * self.value, hidden, bias=config.linear_bias)

    def forward(
        self,
        hidden_BSH: Tensor,
        shared_keys: Tensor | None,
        shared_values: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        past_key_values: Cache | None,
        places_S: Tensor,
        first_positions: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor, None, None, Tensor | None]:
        """Output [B, S, H]; nothing for the layers after it; attention weights where they are computed."""
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden_BSH)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_BSH)))
        query = query.unflatten(-1, (-1, self.plain + self.rotated)).transpose(1, 2)
        latent, turned = self.kv_a_proj_with_mqa(hidden_BSH).split(
            [self.config.kv_lora_rank or 0, self.rotated], dim=-1
        )
        mixed = self.kv_b_proj(self.kv_a_layernorm(latent))
        mixed = mixed.unflatten(-1, (-1, self.plain + self.value)).transpose(1, 2)
        key, value = mixed.split([self.plain, self.value], dim=-1)
        turned = rotate(in_halves(turned[:, None]), position_embeddings).expand(-1, key.shape[1], -1, -1)
        key = torch.cat((key, turned), dim=-1)
        query, query_turned = query.split([self.plain, self.rotated], dim=-1)
        query = torch.cat((query, rotate(in_halves(query_turned), position_embeddings)), dim=-1)
        if past_key_values is not None:
            key, value = cached(past_key_values, key, value, self.layer_idx, places_S)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2)), None, None, weights


def in_halves(x: Tensor) -> Tensor:
    """Channels that are rotated in pairs of neighbours, as pairs of the first and the second half."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


# ---- MLPs and experts


class MegatronMoeMLP(nn.Module):
    """A dense MLP, gated or not."""

    def __init__(self, hidden: int, width: int, act: str, *, gated: bool, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias) if gated else None
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.act_fn = ACT2FN[act]

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        up = self.up_proj(x)
        inner = self.act_fn(up) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * up
        output: Tensor = self.down_proj(inner)
        return output


def build_mlp(config: MegatronMoeConfig, width: int) -> MegatronMoeMLP:
    """An MLP as the model has it everywhere."""
    return MegatronMoeMLP(config.hidden_size, width, config.hidden_act, gated=config.gated_mlp, bias=config.linear_bias)


def has_grouped_kernel(rows: Tensor, *weights: Tensor) -> bool:
    """Whether `grouped_mm` is one kernel here, rather than a loop that asks the device."""
    if rows.device.type != "cuda" or not hasattr(F, "grouped_mm") or rows.dtype != torch.bfloat16 or len(rows) == 0:
        return False
    # "strides should be multiple of 16 bytes"
    aligned = all(size % 8 == 0 for weight in weights for size in weight.shape[1:])
    return aligned and torch.cuda.get_device_capability(rows.device) >= (8, 0)


class MegatronMoeExperts(nn.Module):
    """All experts of a layer, stacked: gate rows first, then value rows where they are gated."""

    def __init__(self, config: MegatronMoeConfig, experts: int) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.moe_intermediate_size
        self.gated = config.gated_mlp
        self.dropout = config.expert_dropout
        self.act_fn = ACT2FN[config.hidden_act]
        rows = 2 * width if self.gated else width
        self.up_proj = nn.Parameter(torch.empty(experts, rows, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.up_bias = nn.Parameter(torch.empty(experts, rows)) if config.linear_bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, hidden)) if config.linear_bias else None

    def forward(self, x_NH: Tensor, token_R: Tensor, expert_R: Tensor, weight_R: Tensor) -> Tensor:
        """Weighted output [R, H] of every row.

        Args:
            x_NH: tokens.
            token_R, expert_R: which token goes to which expert.
            weight_R: by how much its output counts.
        """
        order_R = expert_R.argsort(stable=True)
        sorted_R = expert_R[order_R]
        rows_RH, weight_R1 = x_NH[token_R[order_R]], weight_R[order_R, None]
        parts: list[Tensor | None] = [self.up_proj, self.up_bias, self.down_proj, self.down_bias]
        device = rows_RH.device.type
        if torch.is_autocast_enabled(device):
            # `grouped_mm` takes no part in autocast.
            dtype = torch.get_autocast_dtype(device)
            rows_RH, parts = rows_RH.to(dtype), [part if part is None else part.to(dtype) for part in parts]
        experts = torch.arange(self.up_proj.shape[0], device=sorted_R.device)
        ends_E = torch.searchsorted(sorted_R, experts, right=True)
        if has_grouped_kernel(rows_RH, self.up_proj, self.down_proj):
            out_RH = self._at_once(rows_RH, weight_R1, sorted_R, ends_E.int(), parts)
        else:
            out_RH = self._one_by_one(rows_RH, weight_R1, ends_E, parts)
        back_R = torch.empty_like(order_R).scatter(0, order_R, torch.arange(len(order_R), device=order_R.device))
        return out_RH[back_R]

    def _at_once(
        self, rows_RH: Tensor, weight_R1: Tensor, expert_R: Tensor, ends_E: Tensor, parts: list[Tensor | None]
    ) -> Tensor:
        up, up_bias, down, down_bias = parts
        assert up is not None
        assert down is not None
        inner = F.grouped_mm(rows_RH, up.mT, offs=ends_E)
        if up_bias is not None:
            inner = inner + up_bias[expert_R]
        out = F.grouped_mm(self._activated(inner, weight_R1), down.mT, offs=ends_E)
        return out if down_bias is None else out + (down_bias[expert_R] * weight_R1).to(out.dtype)

    def _one_by_one(self, rows_RH: Tensor, weight_R1: Tensor, ends_E: Tensor, parts: list[Tensor | None]) -> Tensor:
        # Their gradients are stacked once; indexing would make a tensor of all experts for each of them.
        by_expert = [[None] * len(ends_E) if part is None else part.unbind(0) for part in parts]
        outputs, start = [], 0
        for stop, up, up_bias, down, down_bias in zip(ends_E.tolist(), *by_expert, strict=True):
            if stop > start:
                weight = weight_R1[start:stop]
                inner = F.linear(rows_RH[start:stop], up, up_bias)
                out = F.linear(self._activated(inner, weight), down)
                outputs.append(out if down_bias is None else out + (down_bias * weight).to(out.dtype))
            start = stop
        return torch.cat(outputs) if outputs else rows_RH

    def _activated(self, inner: Tensor, weight_R1: Tensor) -> Tensor:
        """The activation, times the routing weight, which is exact before the second matrix too."""
        if self.gated:
            gate, value = inner.chunk(2, dim=-1)
            inner = self.act_fn(gate) * value
        else:
            inner = self.act_fn(inner)
        scaled = (inner * weight_R1).to(inner.dtype)
        return F.dropout(scaled, self.dropout, training=self.training)


# ---- routers


class MegatronMoeRoutingEmbedding(nn.Module):
    """An embedding of the token id for routing, and a gate on it for every number of experts."""

    def __init__(self, config: MegatronMoeConfig, counts: list[int]) -> None:
        super().__init__()
        self.dtype = DTYPES[config.router_dtype]
        self.table = nn.Parameter(torch.empty(config.vocab_size, config.router_embedding_size))
        self.counts = sorted(set(counts))
        for count in self.counts:
            self.register_parameter(f"gate_{count}", nn.Parameter(torch.empty(count, config.router_embedding_size)))

    def forward(self, ids_BS: Tensor) -> dict[int, Tensor]:
        """Logits [N, E] for every number of experts E."""
        with torch.autocast(ids_BS.device.type, enabled=False):
            rows_NR = F.embedding(ids_BS.reshape(-1), self.table).to(self.dtype)
            return {count: rows_NR @ getattr(self, f"gate_{count}").to(self.dtype).t() for count in self.counts}


class MegatronMoeRouter(nn.Module):
    """Which experts a token goes to, and by how much each counts."""

    def __init__(self, config: MegatronMoeConfig, experts: int) -> None:
        super().__init__()
        self.config, self.experts = config, experts
        self.kind, self.topk = config.router_type, config.num_experts_per_tok
        self.dtype = DTYPES[config.router_dtype]
        if self.kind in FIXED_ROUTERS:
            self.register_buffer("token_map", fresh_map(config, experts))
        elif self.kind == "token-embedding":
            shared = config.router_embedding_shared
            self.embedding = None if shared else MegatronMoeRoutingEmbedding(config, [experts])
        else:
            self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        if config.use_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32))
        if self.kind == "expert-choice":
            self.register_buffer("cutoffs", torch.full((experts,), 1.0 / experts, dtype=torch.float32))
            # How many steps of training they are the mean of.
            self.register_buffer("cutoff_steps", torch.zeros(1, dtype=torch.int64))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """Biases and cutoffs stay in fp32, unrounded, when the model is converted to a half type."""
        before = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return self

    def forward(
        self, x_NH: Tensor, ids_BS: Tensor | None, domains_BS: Tensor | None, logits_NE: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Route.

        Args:
            x_NH: tokens.
            ids_BS: their ids.
            domains_BS: their domains.
            logits_NE: of the routing embedding that all layers share.

        Returns:
            Logits [N, E] if there are any; experts [N, K], E standing for none; and their weights [N, K].
        """
        if self.kind in FIXED_ROUTERS:
            experts_NK = self._looked_up(ids_BS, domains_BS)
            weights_NK = torch.full(experts_NK.shape, 1.0 / self.topk, dtype=torch.float32, device=x_NH.device)
            return None, experts_NK, weights_NK
        with torch.autocast(x_NH.device.type, enabled=False):
            if logits_NE is None:
                logits_NE = self._logits(x_NH, ids_BS)
            experts_NK, weights_NK = self._chosen(logits_NE)
        return logits_NE, experts_NK, weights_NK

    def _looked_up(self, ids_BS: Tensor | None, domains_BS: Tensor | None) -> Tensor:
        ids_N = require_ids(ids_BS).reshape(-1)
        table: Any = self.token_map
        if self.kind == "hash":
            return table[ids_N].long()
        domain_N = torch.zeros_like(ids_N) if domains_BS is None else domains_BS.reshape(-1)
        return table[domain_N, ids_N].long()

    def _logits(self, x_NH: Tensor, ids_BS: Tensor | None) -> Tensor:
        if self.kind == "token-embedding":
            assert self.embedding is not None
            own: Tensor = self.embedding(require_ids(ids_BS))[self.experts]
            return own
        logits_NE = F.linear(x_NH.to(self.dtype), self.weight.to(self.dtype))
        scale = self.config.router_scale
        if scale is None:
            return logits_NE
        length_N1 = torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True, dtype=self.dtype)
        length_E = torch.linalg.vector_norm(self.weight, dim=1, dtype=self.dtype)
        return scale * logits_NE / (length_N1 * length_E + EPSILON)

    def _chosen(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "base":
            experts_N1 = logits_NE.argmax(dim=1, keepdim=True)
            return experts_N1, torch.sigmoid(logits_NE.gather(1, experts_N1))
        if self.kind == "expert-choice":
            probs_NE = torch.softmax(logits_NE, dim=1)
            cutoffs_E: Any = self.cutoffs
            taken_NE = probs_NE >= cutoffs_E
            all_E = torch.arange(self.experts, device=logits_NE.device)
            return all_E.where(taken_NE, self.experts), probs_NE * taken_NE
        if self.config.router_sinkhorn:
            softmax = torch.softmax(logits_NE, dim=-1, dtype=torch.float32).type_as(logits_NE)
            weights_NK, experts_NK = (torch.sigmoid(logits_NE) if self.topk == 1 else softmax).topk(self.topk, dim=1)
            return experts_NK, weights_NK
        return self._top(logits_NE)

    def _top(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        if config.score_function == "softmax" and not config.softmax_before_topk:
            experts_NK = self._best(logits_NE)
            weights_NK = torch.softmax(logits_NE.gather(1, experts_NK), dim=-1, dtype=torch.float32)
        elif config.score_function == "softmax":
            scores_NE = torch.softmax(logits_NE, dim=-1, dtype=torch.float32)
            experts_NK = self._best(scores_NE)
            weights_NK = scores_NE.gather(1, experts_NK)
        else:
            scores_NE = torch.sigmoid(logits_NE.float())
            bias: Any = self.expert_bias.float() if config.use_expert_bias else 0.0
            experts_NK = self._best(scores_NE + bias)
            weights_NK = scores_NE.gather(1, experts_NK)
            if self.topk > 1:
                weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        if config.routed_scaling_factor is not None:
            weights_NK = weights_NK * config.routed_scaling_factor
        return experts_NK, weights_NK.type_as(logits_NE)

    def _best(self, scores_NE: Tensor) -> Tensor:
        """The K best experts, out of the best groups only where there are groups."""
        groups, chosen = self.config.n_group, self.config.topk_group
        if groups is not None and chosen is not None:
            grouped = scores_NE.unflatten(1, (groups, -1))
            best = grouped.topk(self.topk // chosen, dim=-1).values.sum(dim=-1).topk(chosen, dim=-1).indices
            open_groups = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores_NE.device)
            open_groups = open_groups.scatter(1, best, True)
            scores_NE = grouped.masked_fill(~open_groups[..., None], -torch.inf).flatten(1)
        return scores_NE.topk(self.topk, dim=1).indices


def fresh_map(config: MegatronMoeConfig, experts: int) -> Tensor:
    """A table for a model without a checkpoint: token ids dealt out in turn. [V, K], or [domains, V, 1]."""
    ids_V1 = torch.arange(config.vocab_size, dtype=torch.int32)[:, None]
    if config.router_type == "hash":
        return (ids_V1 + torch.arange(config.num_experts_per_tok, dtype=torch.int32)) % experts
    shares = config.router_domain_shares or [1] * (config.num_domains or 1)
    unit, maps, first = experts // sum(shares), [], 0
    for share in shares:
        maps.append(first + ids_V1 % (unit * share))
        first += unit * share
    return torch.stack(maps)


def require_ids(ids_BS: Tensor | None) -> Tensor:
    """The token ids, which routers that go by them need."""
    if ids_BS is None:
        raise ValueError("inputs_embeds: this model's experts are chosen by token id; give input_ids")
    return ids_BS


# ---- MoE layers


class MegatronMoeExpertResidualBlock(nn.Module):
    """x + W2 relu(W1 norm(x))."""

    def __init__(self, config: MegatronMoeConfig) -> None:
        super().__init__()
        hidden, width = config.hidden_size, EXPERT_RESIDUAL_EXPANSION * config.hidden_size
        self.norm = build_norm(config, hidden)
        self.mlp = MegatronMoeMLP(hidden, width, "relu", gated=False, bias=config.linear_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, H] to [N, H]."""
        output: Tensor = x + self.mlp(self.norm(x))
        return output


class MegatronMoeSparseBlock(nn.Module):
    """Routed experts and what stands beside them."""

    def __init__(self, config: MegatronMoeConfig, experts: int) -> None:
        super().__init__()
        hidden, width, shared = config.hidden_size, config.moe_intermediate_size, config.shared_expert_intermediate_size
        self.experts = experts
        self.router = MegatronMoeRouter(config, experts)
        # Serving engines put their own class in place of an attribute `experts`, with one count for all layers.
        self.routed_experts = MegatronMoeExperts(config, experts)
        self.expert_residual = nn.ModuleList(
            [MegatronMoeExpertResidualBlock(config) for _ in range(config.expert_residual_layers)]
        )
        self.shared_expert = None if shared is None else build_mlp(config, shared)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if config.shared_expert_gate else None
        self.residual_mlp = None if config.residual_combine is None else build_mlp(config, width)
        self.residual_coefficient = nn.Linear(hidden, 2) if config.residual_combine == "softmax" else None

    def forward(
        self,
        hidden_BSH: Tensor,
        ids_BS: Tensor | None,
        domains_BS: Tensor | None,
        logits_NE: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, S, H], and the router's logits [N, E] if it has any; `logits_NE` are a shared embedding's."""
        x_NH = hidden_BSH.flatten(0, 1)
        logits_NE, experts_NK, weights_NK = self.router(x_NH, ids_BS, domains_BS, logits_NE)
        out_NH = self._routed(x_NH, experts_NK, weights_NK)
        if len(self.expert_residual):
            deep_NH = out_NH
            for block in self.expert_residual:
                deep_NH = block(deep_NH)
            out_NH = out_NH + weights_NK.amax(dim=-1, keepdim=True).to(out_NH.dtype) * (deep_NH - out_NH)
        if self.shared_expert is not None:
            shared_NH = self.shared_expert(x_NH)
            if self.shared_expert_gate is not None:
                shared_NH = shared_NH * torch.sigmoid(self.shared_expert_gate(x_NH))
            out_NH = out_NH + shared_NH
        if self.residual_mlp is not None:
            dense_NH = self.residual_mlp(x_NH)
            if self.residual_coefficient is None:
                out_NH = out_NH + dense_NH
            else:
                share_N2 = torch.softmax(self.residual_coefficient(x_NH).float(), dim=-1).to(dense_NH.dtype)
                out_NH = out_NH * share_N2[:, :1] + dense_NH * share_N2[:, 1:]
        return out_NH.view_as(hidden_BSH), logits_NE

    def _routed(self, x_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        if self.router.kind != "expert-choice":
            token_R = torch.arange(len(x_NH), device=x_NH.device).repeat_interleave(experts_NK.shape[1])
            out_RH = self.routed_experts(x_NH, token_R, experts_NK.flatten(), weights_NK.flatten())
            return out_RH.view(*experts_NK.shape, -1).sum(dim=1).to(x_NH.dtype)
        # Any number of experts for each token.
        token_R, column_R = (experts_NK < self.experts).nonzero(as_tuple=True)
        out_RH = self.routed_experts(x_NH, token_R, experts_NK[token_R, column_R], weights_NK[token_R, column_R])
        return torch.zeros_like(x_NH).index_add(0, token_R, out_RH.to(x_NH.dtype))


class MegatronMoeDecoderLayer(GradientCheckpointingLayer):
    """Attention, then an MLP or experts; both behind a norm, both added to the residual stream."""

    def __init__(self, config: MegatronMoeConfig, layer_idx: int) -> None:
        super().__init__()
        self.experts = experts = config.experts_per_layer[layer_idx]
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = build_norm(config, config.hidden_size)
        latent = config.kv_lora_rank is not None
        self.self_attn = (MegatronMoeLatentAttention if latent else MegatronMoeAttention)(config, layer_idx)
        self.post_attention_layernorm = build_norm(config, config.hidden_size)
        self.mlp = MegatronMoeSparseBlock(config, experts) if experts else build_mlp(config, config.intermediate_size)

    def forward(
        self,
        hidden_BSH: Tensor,
        shared_keys: Tensor | None = None,
        shared_values: Tensor | None = None,
        routing_logits: Tensor | None = None,
        token_ids: Tensor | None = None,
        domain_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """Hidden states [B, S, H], keys and values for the layers after it, attention weights, router logits.

        What has a gradient is passed by place: gradient checkpointing sees it then.
        """
        attended, shared_keys, shared_values, weights = self.self_attn(
            self.input_layernorm(hidden_BSH), shared_keys, shared_values, **kwargs
        )
        hidden_BSH = hidden_BSH + self._dropped(attended)
        normed, logits = self.post_attention_layernorm(hidden_BSH), None
        if isinstance(self.mlp, MegatronMoeSparseBlock):
            out, logits = self.mlp(normed, token_ids, domain_ids, routing_logits)
        else:
            out = self.mlp(normed)
        return hidden_BSH + self._dropped(out), shared_keys, shared_values, weights, logits

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.hidden_dropout, training=self.training)


# ---- models


class MegatronMoePreTrainedModel(PreTrainedModel):
    """What the models share: how they load, and what they can do."""

    config_class = MegatronMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MegatronMoeDecoderLayer"]  # noqa: RUF012 - a class attribute of transformers
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["expert_bias", "cutoffs"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that does not hold exactly this model's tensors is an error: there they
        are reported, and what is missing is drawn at random.

        Raises:
            ValueError: names a tensor that is missing, left over or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        mismatched = () if kwargs.get("ignore_mismatched_sizes") else info["mismatched_keys"]
        for what, keys in (
            ("lacks", info["missing_keys"]),
            ("also holds", info["unexpected_keys"]),
            ("has another shape of", mismatched),
        ):
            if keys:
                names = sorted(str(key) for key in keys)
                raise ValueError(
                    f"{pretrained_model_name_or_path}: is not a checkpoint of {cls.__name__} with this config.json: it "
                    f"{what} {len(names)} tensors, the first is {names[0]}; export or copy it again"
                )
        return (model, info) if wants_info else model

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, unless token ids decide on experts: a new id has none.

        Raises:
            ValueError: they do.
        """
        config = self.config
        by_id = config.router_type in (*FIXED_ROUTERS, "token-embedding") and any(config.experts_per_layer)
        if by_id and new_num_tokens not in (None, config.vocab_size):
            raise ValueError(
                f"{new_num_tokens} token ids: must be {config.vocab_size}; with router_type {config.router_type} a new "
                "id has no experts"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if not isinstance(module, (MegatronMoeExperts, MegatronMoeRouter, MegatronMoeRoutingEmbedding)):
            return
        for name, parameter in module.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, mean=0.0, std=self.config.initializer_range)


class MegatronMoeModel(MegatronMoePreTrainedModel):
    """The decoder without its output projection."""

    # The base of a checkpoint with an output projection of its own.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012 - a class attribute of transformers

    def __init__(self, config: MegatronMoeConfig) -> None:
        super().__init__(config)
        hidden = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        if config.position_embedding_type == "learned_absolute":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, hidden)
        if config.domain_embedding:
            self.embed_domains = nn.Embedding(config.num_domains or 1, hidden)
        counts = [count for count in config.experts_per_layer if count]
        shares = config.router_type == "token-embedding" and config.router_embedding_shared
        self.routing_embedding = MegatronMoeRoutingEmbedding(config, counts) if shares and counts else None
        self.layers = nn.ModuleList(
            [MegatronMoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = build_norm(config, hidden)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Of token ids."""
        return self.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace them."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        domain_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Hidden states of all tokens.

        Args:
            domain_ids: the domain of every text [B] or [B, 1], or of every token [B, S]; for models with domains.
            Others as everywhere in transformers.
        """
        config = self.config
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, not both")
        use_cache = self._default(use_cache, "use_cache")
        output_attentions = self._default(output_attentions, "output_attentions")
        output_hidden_states = self._default(output_hidden_states, "output_hidden_states")
        output_router_logits = self._default(output_router_logits, "output_router_logits")
        if output_attentions and config._attn_implementation != "eager":
            raise ValueError("output_attentions: needs attn_implementation='eager'; the others keep no weights")
        # Every n-th layer may be checkpointed, of which none can write to a cache twice.
        if self.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            use_cache, past_key_values = False, None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        places_S = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
        if position_ids is None:
            position_ids = places_S[None]
        # The position of the first key, below 0 where the text begins behind padding. Worked out now: a static cache
        # moves its length on as layers write.
        first = position_ids[:, -1:] - (past_length + position_ids.shape[1] - 1)
        mask = causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids, places_S)
        rope = config.position_embedding_type == "rope"
        tables = rotary_tables(config, position_ids) if rope else None
        domains = self._domains(domain_ids, inputs_embeds)
        hidden = self._embedded(inputs_embeds, position_ids, domains)
        routing = None if self.routing_embedding is None else self.routing_embedding(require_ids(input_ids))
        states: tuple[Any, ...] = ()
        attentions: tuple[Any, ...] = ()
        router_logits: tuple[Any, ...] = ()
        keys = values = None
        for layer in self.layers:
            states += (hidden,) if output_hidden_states else ()
            hidden, keys, values, weights, logits = layer(
                hidden,
                keys,
                values,
                None if routing is None else routing.get(layer.experts),
                token_ids=input_ids,
                domain_ids=domains,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=tables,
                past_key_values=past_key_values,
                places_S=places_S,
                first_positions=first,
                **kwargs,
            )
            attentions += (weights,) if output_attentions else ()
            router_logits += (logits,) if output_router_logits and logits is not None else ()
        hidden = self.norm(hidden)
        output = MoeModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=attentions or None,
            router_logits=router_logits or None,
        )
        return output if self._default(return_dict, "return_dict") else output.to_tuple()

    def _default(self, value: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name) if value is None else value)

    def _embedded(self, inputs_embeds: Tensor, position_ids: Tensor, domains_BS: Tensor | None) -> Tensor:
        hidden = inputs_embeds
        if self.config.position_embedding_type == "learned_absolute":
            hidden = hidden + self.embed_positions(position_ids)
        if self.config.domain_embedding:
            hidden = hidden + self.embed_domains(domains_BS)
        return F.dropout(hidden, self.config.hidden_dropout, training=self.training)

    def _domains(self, domain_ids: Tensor | None, inputs_embeds: Tensor) -> Tensor | None:
        """[B, S], if the model asks for domains."""
        config = self.config
        if not config.domain_embedding and config.router_type != "random-routed":
            return None
        shape = inputs_embeds.shape[:2]
        if domain_ids is None:
            if (config.num_domains or 1) > 1:
                names = f" ({', '.join(config.domain_names)})" if config.domain_names else ""
                raise ValueError(
                    f"domain_ids: the model tells {config.num_domains} domains apart{names}; give the number of every "
                    "text's"
                )
            return torch.zeros(shape, dtype=torch.long, device=inputs_embeds.device)
        if domain_ids.dim() == 1:
            domain_ids = domain_ids[:, None]
        return domain_ids.to(inputs_embeds.device).expand(shape)


def balancing_loss(config: MegatronMoeConfig, router_logits: tuple[Tensor, ...]) -> Tensor:
    """E times the sum over experts of (share of the assignments) x (mean score), added up over the layers: the loss of
    Switch Transformer, as in training."""
    losses = []
    for logits_NE in router_logits:
        if config.score_function == "softmax":
            scores_NE = torch.softmax(logits_NE, dim=-1, dtype=torch.float32)
        else:
            scores_NE = torch.sigmoid(logits_NE.float())
            scores_NE = scores_NE / (scores_NE.sum(dim=-1, keepdim=True) + 1e-20)
        chosen_NK = scores_NE.topk(config.num_experts_per_tok, dim=-1).indices
        share_E = torch.zeros_like(scores_NE).scatter(1, chosen_NK, 1.0 / config.num_experts_per_tok).mean(dim=0)
        losses.append(logits_NE.shape[1] * (share_E * scores_NE.mean(dim=0)).sum().to(router_logits[0].device))
    return torch.stack(losses).sum()


class MegatronMoeForCausalLM(MegatronMoePreTrainedModel, GenerationMixin):
    """The decoder with its output projection."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - of transformers

    def __init__(self, config: MegatronMoeConfig) -> None:
        super().__init__(config)
        self.model = MegatronMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output projection."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replace it."""
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        domain_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits of every next token, and the loss of the `labels`.

        Args:
            domain_ids: the domain of every text [B] or [B, 1], or of every token [B, S]; for models with domains.
            logits_to_keep: of the last so many tokens, or of these places; 0: of all.
            Others as everywhere in transformers.
        """
        config = self.config
        asked = config.output_router_logits if output_router_logits is None else output_router_logits
        loss_options = {key: kwargs.pop(key) for key in ("num_items_in_batch",) if key in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            domain_ids=domain_ids,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=asked,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, int):
            hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        else:
            hidden = hidden[:, logits_to_keep]
        logits = self.lm_head(hidden)
        loss = aux_loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **loss_options)
        if asked and outputs.router_logits and config.router_type in BALANCED_ROUTERS and not config.router_sinkhorn:
            aux_loss = balancing_loss(config, outputs.router_logits)
            if loss is not None:
                loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)
        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
        keeps_names = config.return_dict if return_dict is None else return_dict
        return output if keeps_names else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, domain_ids: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As everywhere; new tokens are of the domain of the last one."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if domain_ids is None:
            return inputs
        if domain_ids.dim() == 2 and domain_ids.shape[1] > 1:
            fed, missing = inputs["input_ids"].shape[1], input_ids.shape[1] - domain_ids.shape[1]
            new = domain_ids[:, -1:].expand(-1, max(0, missing))
            domain_ids = torch.cat((domain_ids, new), dim=1)[:, -fed:]
        inputs["domain_ids"] = domain_ids
        return inputs


__all__ = ["MegatronMoeForCausalLM", "MegatronMoeModel", "MegatronMoePreTrainedModel"]
