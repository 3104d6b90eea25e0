"""The shape of the GPT decoder: everything about the network that is not its experts (`moe.py`)."""

import math
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from megatron_moe.config.base import ConfigError, flag_name, format_value, require, require_fraction, require_positive

MOST_LAYERS = 10_000
# More are no domains but something that differs from document to document.
MOST_DOMAINS = 4096
# What an index of torch's kernels holds.
LARGEST_SIZE = 2**31 - 1
YARN_FLAGS = ("original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
LATENT_FLAGS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Decoder-only transformer, pre-normalised. Names and defaults follow Megatron-LM's flags."""

    num_layers: int = 4
    """Number of transformer layers."""
    hidden_size: int = 128
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of a dense MLP and, unless --moe-ffn-hidden-size is given, of an expert. Default: 4 x hidden
    size; with --swiglu 8/3 x hidden size, rounded down to a multiple of 64 (as Megatron-LM)."""
    num_attention_heads: int = 4
    """Number of attention heads."""
    num_query_groups: int | None = None
    """Key/value heads for grouped-query attention. Default: one for each attention head."""
    kv_channels: int | None = None
    """Width of one attention head. Default: hidden size / attention heads."""
    seq_length: int = 256
    """Tokens in a training sample."""
    max_position_embeddings: int | None = None
    """Rows of the learned position table, and the longest text that can be generated. Default:
    --seq-length."""
    position_embedding_type: Literal["learned_absolute", "rope", "none"] = "learned_absolute"
    """How positions enter: a learned table, rotary embeddings, or not at all."""
    rotary_base: int = 10000
    """Base period of the rotary embeddings."""
    rotary_percent: float = 1.0
    """Fraction of a head's channels that are rotated."""
    use_rope_scaling: bool = False
    """Stretch the slow rotary frequencies as Llama 3.1 does, whose text of 8192 tokens became longer."""
    rope_scaling_factor: float = 8.0
    """How many times longer they become (Llama 3.1: 8, 3.2: 32); fast ones stay, those between are mixed."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Which norm."""
    norm_epsilon: float = 1e-5
    """Epsilon inside the norms."""
    swiglu: bool = False
    """Gated SiLU in the MLPs and experts instead of GELU."""
    squared_relu: bool = False
    """relu(x)^2 in the MLPs and experts instead of GELU."""
    gelu_tanh: bool = False
    """GELU by its tanh approximation in the MLPs and experts (GPT-2, and Megatron-LM's fused bias and GELU)."""
    disable_bias_linear: bool = False
    """No biases in the linear layers."""
    add_qkv_bias: bool = False
    """Biases in the query/key/value projection only (useful with --disable-bias-linear)."""
    untie_embeddings_and_output_weights: bool = False
    """An output projection of its own instead of the transposed embedding."""
    qk_layernorm: bool = False
    """Normalise every query and key head before the dot product; with --multi-latent-attention the latent vectors
    instead."""
    qk_layernorm_type: Literal["head", "projection"] = "head"
    """What --qk-layernorm normalises: each head by itself, with the same weights for all (Qwen3), or all heads of a
    token as one vector (OLMoE)."""
    multi_latent_attention: bool = False
    """Make keys and values of all heads from one small vector of a token (DeepSeek-V2 and V3)."""
    q_lora_rank: int | None = None
    """Width of a second such vector, that queries are made from. Default: they are projected as ever."""
    kv_lora_rank: int = 512
    """Width of the vector that keys and values are made from."""
    qk_head_dim: int = 128
    """Channels of a query and key head that are not rotated."""
    qk_pos_emb_head_dim: int = 64
    """Channels of a query and key head that are; all heads share those of the key."""
    v_head_dim: int = 128
    """Channels of a value head."""
    rotary_scaling_factor: float | None = None
    """Stretch the rotary frequencies of --multi-latent-attention by YaRN (arXiv 2309.00071), for texts that are so many
    times longer (DeepSeek-V3: 40). Default: not."""
    original_max_position_embeddings: int = 4096
    """YaRN: tokens of the texts that the model saw before."""
    beta_fast: float = 32.0
    """YaRN: frequencies that turn this often in such a text stay as they are."""
    beta_slow: float = 1.0
    """YaRN: those that turn less often than this are stretched whole; those between are mixed."""
    mscale: float = 1.0
    """YaRN: rotated channels grow by (0.1 x mscale x ln factor + 1) / (0.1 x mscale-all-dim x ln factor + 1)."""
    mscale_all_dim: float = 0.0
    """YaRN: attention scores grow by (0.1 x mscale-all-dim x ln factor + 1)^2 (DeepSeek-V3: 1, as --mscale)."""
    attention_weight_reuse_prob: float = 1.0
    """Probability that a layer computes its attention weights; otherwise it takes those of the layer before (HunYuan
    1T: 0.5). Drawn for every layer and micro-batch, in training only; attention dropout is drawn anew on weights that
    are taken over. 1: every layer computes."""
    attention_weight_reuse_span: int | None = None
    """Layers 1, K+1, 2K+1, ... always compute their attention weights; it must divide the layers of a pipeline stage.
    Default: layer 1 only."""
    cla_share_factor: int = 1
    """Cross-layer attention (Hunyuan-Large: 2): layers 1, K+1, 2K+1, ... have keys and values, the layers after them
    have a query projection only and use theirs; it must divide the layers of a pipeline stage. 1: every layer has its
    own."""
    num_domains: int | None = None
    """Domains of the text: the token files hold one for every document (tools/preprocess_data.py --domain-key)."""
    domain_names: tuple[str, ...] | None = None
    """Their names in the order of their numbers. Default: those that stand beside the token files, which then must be
    these; checkpoints keep them, so that generate and score know domains by name."""
    domain_embedding: bool = False
    """Add a learned vector of the token's domain to its embedding (PanGu-Sigma)."""
    attention_dropout: float = 0.1
    """Dropout on the attention weights."""
    hidden_dropout: float = 0.1
    """Dropout on the embedding and on what each sublayer adds to the residual stream."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output projections are divided by sqrt(2 x layers)."""
    vocab_size: int | None = None
    """Vocabulary before padding. Default: the tokenizer's."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this; the tensor-parallel size must divide it, so that the
    padded size, and with it the weights, do not depend on the layout."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Who provides linear layers, norms and attention: megatron-core's plain torch modules with this
    package's attention and norms, or Transformer Engine (CUDA; pip install 'megatron_moe[te]')."""
    attention_backend: Literal["sdpa", "unfused"] = "sdpa"
    """Core attention of the local implementation: torch's scaled_dot_product_attention, or megatron-core's
    own DotProductAttention, which keeps the S x S matrix (for comparison)."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "seq_length",
            "max_position_embeddings",
            "rotary_base",
            "vocab_size",
            "make_vocab_size_divisible_by",
            "attention_weight_reuse_span",
            "cla_share_factor",
            "num_domains",
            "original_max_position_embeddings",
            *LATENT_FLAGS,
        )
        reuse = self.attention_weight_reuse_prob
        require(0.0 <= reuse <= 1.0, "attention_weight_reuse_prob", reuse, "in [0, 1]")
        self._check_domains()
        for name in (
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "kv_channels",
            "seq_length",
            "vocab_size",
            *LATENT_FLAGS,
        ):
            size = getattr(self, name)
            require(size is None or size <= LARGEST_SIZE, name, size, f"at most {LARGEST_SIZE}")
        # Layers are counted one by one: a slip, or a file that means harm, must not take all memory.
        require(self.num_layers <= MOST_LAYERS, "num_layers", self.num_layers, f"at most {MOST_LAYERS}")
        domains = self.num_domains
        require(domains is None or domains <= MOST_DOMAINS, "num_domains", domains, f"at most {MOST_DOMAINS}")
        require_fraction(self, "attention_dropout", "hidden_dropout")
        require(0.0 < self.rotary_percent <= 1.0, "rotary_percent", self.rotary_percent, "in (0, 1]")
        require(self.norm_epsilon > 0.0, "norm_epsilon", self.norm_epsilon, "greater than 0")
        require(self.init_method_std > 0.0, "init_method_std", self.init_method_std, "greater than 0")
        for one, two in combinations(("swiglu", "squared_relu", "gelu_tanh"), 2):
            if getattr(self, one) and getattr(self, two):
                raise ConfigError(f"{flag_name(one)} and {flag_name(two)}: give one of them")
        if self.qk_layernorm_type != "head":
            kind = f"--qk-layernorm-type {self.qk_layernorm_type}"
            for needed, flag in (
                (self.qk_layernorm, "--qk-layernorm"),
                (self.normalization == "RMSNorm", "--normalization RMSNorm"),
                (self.transformer_impl == "local", "--transformer-impl local"),
            ):
                if not needed:
                    raise ConfigError(f"{kind}: needs {flag}")
        factor = self.rope_scaling_factor
        require(1.0 <= factor < math.inf, "rope_scaling_factor", factor, "at least 1")
        if factor != type(self).rope_scaling_factor and not self.use_rope_scaling:
            raise ConfigError(f"--rope-scaling-factor {factor}: needs --use-rope-scaling")
        self._check_latent()
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads and not self.multi_latent_attention:
            raise ConfigError(
                f"--hidden-size {self.hidden_size}: must be a multiple of --num-attention-heads "
                f"{self.num_attention_heads}, or give --kv-channels"
            )
        if self.num_attention_heads % self.query_groups:
            raise ConfigError(
                f"--num-query-groups {self.num_query_groups}: must divide --num-attention-heads "
                f"{self.num_attention_heads}"
            )
        if self.max_position_embeddings is not None and self.max_position_embeddings < self.seq_length:
            raise ConfigError(
                f"--max-position-embeddings {self.max_position_embeddings}: must be at least --seq-length "
                f"{self.seq_length}"
            )

    def _check_yarn(self) -> None:
        factor = self.rotary_scaling_factor
        if factor is None:
            for name in YARN_FLAGS:
                value = getattr(self, name)
                if value != getattr(type(self), name):
                    raise ConfigError(f"{flag_name(name)} {value}: needs --rotary-scaling-factor")
            return
        require(1.0 <= factor < math.inf, "rotary_scaling_factor", factor, "at least 1")
        require(0.0 < self.beta_slow < math.inf, "beta_slow", self.beta_slow, "greater than 0")
        require(self.beta_slow < self.beta_fast < math.inf, "beta_fast", self.beta_fast, "greater than --beta-slow")
        for name in ("mscale", "mscale_all_dim"):
            require(0.0 <= getattr(self, name) < math.inf, name, getattr(self, name), "at least 0")

    def _check_latent(self) -> None:
        self._check_yarn()
        if not self.multi_latent_attention:
            for name in (*LATENT_FLAGS, "rotary_scaling_factor"):
                value = getattr(self, name)
                if value != getattr(type(self), name):
                    raise ConfigError(f"{flag_name(name)} {value}: needs --multi-latent-attention")
            return
        for needed, flag in (
            (self.position_embedding_type == "rope", "--position-embedding-type rope"),
            (self.transformer_impl == "local", "--transformer-impl local"),
            (self.attention_backend == "sdpa", "--attention-backend sdpa"),
        ):
            if not needed:
                raise ConfigError(f"--multi-latent-attention: needs {flag}")
        for name in (
            "kv_channels",
            "num_query_groups",
            "add_qkv_bias",
            "rotary_percent",
            "use_rope_scaling",
            "qk_layernorm_type",
            "cla_share_factor",
            "attention_weight_reuse_prob",
        ):
            value = getattr(self, name)
            if value != getattr(type(self), name):
                flag = flag_name(name) if value is True else f"{flag_name(name)} {value}"
                raise ConfigError(f"{flag}: cannot be combined with --multi-latent-attention")
        rotated = self.qk_pos_emb_head_dim
        require(rotated % 2 == 0, "qk_pos_emb_head_dim", rotated, "even: channels are rotated in pairs")

    def _check_domains(self) -> None:
        names = self.domain_names
        if self.num_domains is None and self.domain_embedding:
            raise ConfigError("--domain-embedding: needs --num-domains")
        if names is None:
            return
        if self.num_domains is None:
            raise ConfigError("--domain-names: needs --num-domains")
        if len(set(names)) < len(names) or len(names) > self.num_domains:
            most = f"at most --num-domains {self.num_domains}"
            raise ConfigError(f"--domain-names {format_value(names)}: must be different names, {most}")

    @property
    def ffn_size(self) -> int:
        """Width of a dense MLP after the default is applied."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.swiglu:
            return max(64, int(4 * self.hidden_size * 2 / 3) // 64 * 64)
        return 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        """Number of key/value heads after the default is applied."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one query and key head after the default is applied."""
        if self.multi_latent_attention:
            return self.qk_head_dim + self.qk_pos_emb_head_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def value_dim(self) -> int:
        """Width of one value head after the default is applied."""
        return self.v_head_dim if self.multi_latent_attention else self.head_dim

    @property
    def max_positions(self) -> int:
        """Longest sequence the model accepts after the default is applied."""
        return self.max_position_embeddings or self.seq_length

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to --make-vocab-size-divisible-by.

        Raises:
            ConfigError: the vocabulary is not known yet.
        """
        if self.vocab_size is None:
            raise ConfigError("--vocab-size: not known; give it, or --tokenizer-model")
        multiple = self.make_vocab_size_divisible_by
        return (self.vocab_size + multiple - 1) // multiple * multiple
