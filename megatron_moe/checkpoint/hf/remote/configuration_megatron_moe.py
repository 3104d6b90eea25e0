"""Configuration of a model that megatron_moe trained. Copied into the checkpoint's folder; stands by itself."""

from typing import Any

try:
    from transformers import PreTrainedConfig
except ImportError as error:
    raise ImportError("a megatron_moe model needs transformers 5: pip install -U transformers") from error

_CHOICES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "gelu_pytorch_tanh", "relu2", "silu"),
    "norm_type": ("layernorm", "rmsnorm"),
    "qk_norm": (None, "head", "projection", "latent"),
    "position_embedding_type": ("learned_absolute", "rope", "none"),
    "router_type": (
        "topk",
        "large-margin",
        "recycle",
        "random-routed",
        "hash",
        "base",
        "expert-choice",
        "token-embedding",
    ),
    "score_function": ("softmax", "sigmoid"),
    "router_dtype": ("float32", "float64"),
    "residual_combine": (None, "softmax", "add"),
}


class MegatronMoeConfig(PreTrainedConfig):
    """What the network is made of. The dropouts and the balancing loss count in fine-tuning only.

    Args:
        vocab_size: token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of a dense MLP.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads.
        head_dim: width of a head.
        hidden_act: activation of MLPs and experts.
        gated_mlp: MLPs and experts compute act(gate) * value.
        linear_bias: biases in all linear layers.
        attention_bias: biases in the query, key and value projections.
        norm_type: `layernorm` (with biases) or `rmsnorm`.
        norm_eps: epsilon inside the norms.
        qk_norm: normalise queries and keys before the rotation: each `head` or the whole `projection`; or the `latent`
            vectors they are made from; None: neither.
        kv_lora_rank: width of the latent vector that keys and values of all heads are made from; None: they are
            projected from the hidden state.
        q_lora_rank: width of the latent vector that queries are made from; None: there is none.
        qk_nope_head_dim, qk_rope_head_dim: channels of a head that are not rotated, and that are, with a latent vector.
        v_head_dim: channels of a value with a latent vector.
        position_embedding_type: a learned table, rotary embeddings, or none.
        max_position_embeddings: rows of the learned table; longest text of training otherwise.
        rotary_base: base period of the rotary embeddings.
        rotary_percent: fraction of a head's channels that is rotated.
        rotary_scaling_factor: frequencies are stretched by this, as Llama 3.1 does it; None: they are not.
        rotary_yarn: frequencies stretched by YaRN, with latent attention only: `factor`,
            `original_max_position_embeddings`, `beta_fast`, `beta_slow`, `mscale` and `mscale_all_dim`; None: not so.
        kv_share_factor: layers 0, K, 2K, ... have keys and values, the layers between use them.
        num_domains: domains of the text that `domain_ids` tells apart.
        domain_names: their names in the order of their numbers.
        domain_embedding: add a vector of the token's domain to its embedding.
        experts_per_layer: experts of every layer, 0 for a dense one.
        moe_intermediate_size: width of an expert.
        num_experts_per_tok: experts of a token.
        router_type: how tokens find their experts.
        router_sinkhorn: the router was balanced by Sinkhorn's algorithm, and weighs by its plain scores.
        router_dtype: precision of the router's arithmetic.
        router_scale: router logits are cosines times this (large-margin); None: plain products.
        router_embedding_size: width of the routing embedding (token-embedding).
        router_embedding_shared: one routing embedding for all layers (token-embedding).
        router_domain_shares: experts of each domain, relative to each other (random-routed); None: equal.
        score_function: turns router logits into scores.
        softmax_before_topk: softmax over all experts, not over the chosen ones.
        routed_scaling_factor: multiplies the weights of the chosen experts; None: 1.
        n_group: the experts form this many groups; None: one.
        topk_group: a token may use experts of this many groups.
        use_expert_bias: a bias on the scores that choose, not on those that weigh.
        residual_combine: how a dense MLP beside the experts of every MoE layer is combined with them: by a learned
            two-way `softmax`, `add`, or None: there is none.
        expert_residual_layers: blocks of the residual network behind the experts; 0: none.
        shared_expert_intermediate_size: width of an expert that every token passes through; None: there is none.
        shared_expert_gate: a sigmoid gate on it.
        attention_dropout, hidden_dropout, expert_dropout: in training.
        router_aux_loss_coef: weight of the balancing loss, which is added where router logits are asked for.
        output_router_logits: ask for them.
        initializer_range: standard deviation of new weights.
        use_cache: keep keys and values while generating.
        tie_word_embeddings: the output projection is the embedding.
    """

    model_type = "megatron_moe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - a class attribute of transformers

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 128,
        intermediate_size: int = 512,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "gelu",
        gated_mlp: bool = False,
        linear_bias: bool = True,
        attention_bias: bool = True,
        norm_type: str = "layernorm",
        norm_eps: float = 1e-5,
        qk_norm: str | None = None,
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        position_embedding_type: str = "learned_absolute",
        max_position_embeddings: int = 2048,
        rotary_base: float = 10000.0,
        rotary_percent: float = 1.0,
        rotary_scaling_factor: float | None = None,
        rotary_yarn: dict[str, float] | None = None,
        kv_share_factor: int = 1,
        num_domains: int | None = None,
        domain_names: list[str] | None = None,
        domain_embedding: bool = False,
        experts_per_layer: list[int] | None = None,
        moe_intermediate_size: int = 512,
        num_experts_per_tok: int = 1,
        router_type: str = "topk",
        router_sinkhorn: bool = False,
        router_dtype: str = "float32",
        router_scale: float | None = None,
        router_embedding_size: int = 64,
        router_embedding_shared: bool = True,
        router_domain_shares: list[int] | None = None,
        score_function: str = "softmax",
        softmax_before_topk: bool = True,
        routed_scaling_factor: float | None = None,
        n_group: int | None = None,
        topk_group: int | None = None,
        use_expert_bias: bool = False,
        residual_combine: str | None = None,
        expert_residual_layers: int = 0,
        shared_expert_intermediate_size: int | None = None,
        shared_expert_gate: bool = False,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        expert_dropout: float = 0.0,
        router_aux_loss_coef: float = 0.0,
        output_router_logits: bool = False,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.hidden_act = hidden_act
        self.gated_mlp = gated_mlp
        self.linear_bias = linear_bias
        self.attention_bias = attention_bias
        self.norm_type = norm_type
        self.norm_eps = norm_eps
        self.qk_norm = qk_norm
        self.kv_lora_rank = kv_lora_rank
        self.q_lora_rank = q_lora_rank
        self.qk_nope_head_dim = qk_nope_head_dim
        self.qk_rope_head_dim = qk_rope_head_dim
        self.v_head_dim = v_head_dim
        self.position_embedding_type = position_embedding_type
        self.max_position_embeddings = max_position_embeddings
        self.rotary_base = rotary_base
        self.rotary_percent = rotary_percent
        self.rotary_scaling_factor = rotary_scaling_factor
        self.rotary_yarn = rotary_yarn
        self.kv_share_factor = kv_share_factor
        self.num_domains = num_domains
        self.domain_names = domain_names
        self.domain_embedding = domain_embedding
        self.experts_per_layer = experts_per_layer or [0] * num_hidden_layers
        self.moe_intermediate_size = moe_intermediate_size
        self.num_experts_per_tok = num_experts_per_tok
        self.router_type = router_type
        self.router_sinkhorn = router_sinkhorn
        self.router_dtype = router_dtype
        self.router_scale = router_scale
        self.router_embedding_size = router_embedding_size
        self.router_embedding_shared = router_embedding_shared
        self.router_domain_shares = router_domain_shares
        self.score_function = score_function
        self.softmax_before_topk = softmax_before_topk
        self.routed_scaling_factor = routed_scaling_factor
        self.n_group = n_group
        self.topk_group = topk_group
        self.use_expert_bias = use_expert_bias
        self.residual_combine = residual_combine
        self.expert_residual_layers = expert_residual_layers
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        self.shared_expert_gate = shared_expert_gate
        self.attention_dropout = attention_dropout
        self.hidden_dropout = hidden_dropout
        self.expert_dropout = expert_dropout
        self.router_aux_loss_coef = router_aux_loss_coef
        self.output_router_logits = output_router_logits
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self._check()
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )

    def _check(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"config: {name} is {getattr(self, name)!r}; must be one of {allowed}")
        if len(self.experts_per_layer) != self.num_hidden_layers:
            raise ValueError(
                f"config: experts_per_layer has {len(self.experts_per_layer)} counts; must be one for each of the "
                f"{self.num_hidden_layers} layers"
            )
