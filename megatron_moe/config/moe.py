"""Experts: how many in which layer, how they are combined with a dense MLP, and how tokens are routed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.base import (
    ConfigError,
    flag_name,
    format_value,
    require,
    require_fraction,
    require_positive,
)
from megatron_moe.config.model import MOST_LAYERS
from megatron_moe.config.routers import RouterName


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture-of-experts flags. Without --num-experts the model is dense."""

    num_experts: tuple[int, ...] | None = None
    """Experts per MoE layer: one count for all of them, or one count for each MoE layer in order (a
    pyramid)."""
    expert_interval: int = 1
    """Layers K, 2K, 3K, ... (counted from 1) are MoE layers; the others are dense."""
    moe_layer_freq: tuple[int, ...] | None = None
    """Explicit pattern instead of --expert-interval: one 0 (dense) or 1 (MoE) for each layer."""
    mlp_type: Literal["standard", "residual"] = "standard"
    """`residual` puts a dense MLP beside the routed experts of every MoE layer (PR-MoE)."""
    residual_combine: Literal["softmax", "add"] = "softmax"
    """How the dense MLP and the experts are combined: by a learned two-way softmax (DeepSpeed's code) or by a
    plain sum (the PR-MoE paper's text)."""
    moe_ffn_hidden_size: int | None = None
    """Width of an expert. Default: --ffn-hidden-size."""
    moe_first_dense_layers: int = 0
    """The first K layers are dense, whatever --expert-interval says."""
    use_expert_residual_network: bool = False
    """After the experts, a small residual network mixed in by the token's largest routing weight (PAI GPT-MoE)."""
    expert_residual_layers: int = 6
    """Blocks of that network."""
    moe_expert_dropout: float = 0.0
    """Dropout inside the experts, before their second layer (Switch Transformer's expert dropout)."""
    router: RouterName = "topk"
    """Which router assigns tokens to experts; docs/moe.md compares them."""
    moe_router_topk: int = 1
    """Experts per token (--router expert-choice: on average)."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """Turns router logits into scores."""
    moe_router_pre_softmax: bool | None = None
    """Softmax over all experts before the top-k choice (weights do not sum to 1) instead of over the chosen
    ones. Default: on for top-1, where the other order would give weight 1 to every token, off otherwise."""
    moe_router_topk_scaling_factor: float | None = None
    """Multiplies the chosen experts' weights (needs pre-softmax or sigmoid)."""
    moe_router_num_groups: int | None = None
    """Group-limited routing: the experts form this many groups."""
    moe_router_group_topk: int | None = None
    """Group-limited routing: a token may use experts of this many groups."""
    moe_router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn"] = (
        "aux_loss"
    )
    """How the load is balanced: an auxiliary loss per micro-batch, per sequence or over the global batch,
    Sinkhorn assignment, or not at all."""
    moe_aux_loss_coeff: float = 0.01
    """Weight of the auxiliary loss of --moe-router-load-balancing-type."""
    moe_z_loss_coeff: float | None = None
    """Weight of the router z-loss (ST-MoE: 1e-3)."""
    moe_router_enable_expert_bias: bool = False
    """Aux-loss-free balancing: a bias per expert that moves against its load (needs sigmoid scores)."""
    moe_router_bias_update_rate: float = 1e-3
    """Step of that bias."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Precision of the router's arithmetic."""
    moe_input_jitter_eps: float | None = None
    """Multiplies the router's input by U(1-eps, 1+eps) in training, drawn for every token and channel: the same
    numbers under every layout."""
    moe_router_noise: Literal["none", "rsample"] = "none"
    """Noise on the choice of experts in training: Gumbel noise added to the logits (DeepSpeed's and PAI's RSample)."""
    moe_expert_capacity_factor: float | None = None
    """Tokens an expert accepts, as a multiple of its fair share; the rest skip the experts (--router recycle: go to
    others). Default: dropless. Generation and scoring are always dropless."""
    moe_pad_expert_input_to_capacity: bool = False
    """Pad every expert's input to its capacity (needs --moe-expert-capacity-factor)."""
    moe_min_capacity: int = 0
    """An expert accepts at least this many tokens, whatever the capacity factor says: of the rank, or, with
    recycle and expert-choice, of the whole micro-batch."""
    moe_token_drop_policy: Literal["probs", "position", "random"] = "probs"
    """Which tokens an over-full expert drops: the least probable, the last, or any (random token selection)."""
    moe_shared_expert_intermediate_size: int | None = None
    """Width of an expert that every token passes through, beside the routed ones."""
    moe_shared_expert_gate: bool = False
    """Sigmoid gate on the shared expert."""
    moe_expert_backend: Literal["auto", "grouped", "sequential", "te"] = "auto"
    """What computes the experts: `grouped` matrix products over stacked weights (torch), one expert after the other
    (`sequential`, the reference), or Transformer Engine's (`te`). `auto`: te with --transformer-impl
    transformer_engine, otherwise grouped. Checkpoints are the same."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex", "grouped"] = "alltoall"
    """How tokens travel to their experts' ranks: `grouped` sends a token once to each node and then once to each
    rank inside of it (docs/dispatch.md); `flex`: DeepEP, CUDA only."""
    moe_domain_grouped: bool = False
    """Keep the tokens of a domain on the ranks that hold its experts, so that no exchange leaves them: a sequence holds
    text of one domain, and goes to those ranks. Domains have their shares of the experts in every step too, however
    much text they have (--router random-routed and --moe-token-dispatcher-type grouped; docs/dispatch.md)."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "expert_interval",
            "expert_residual_layers",
            "moe_ffn_hidden_size",
            "moe_router_topk",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_shared_expert_intermediate_size",
        )
        blocks = self.expert_residual_layers
        require(blocks <= MOST_LAYERS, "expert_residual_layers", blocks, f"at most {MOST_LAYERS}")
        require_fraction(self, "moe_input_jitter_eps", "moe_expert_dropout")
        for name in ("moe_first_dense_layers", "moe_min_capacity"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate"):
            value = getattr(self, name)
            require(value is None or value >= 0.0, name, value, "at least 0")
        factor = self.moe_expert_capacity_factor
        require(factor is None or factor > 0.0, "moe_expert_capacity_factor", factor, "greater than 0")
        if self.num_experts is not None:
            require(
                len(self.num_experts) > 0 and min(self.num_experts) >= 1,
                "num_experts",
                self.num_experts,
                "one or more counts, each at least 1",
            )
            require(
                self.moe_router_topk <= min(self.num_experts),
                "moe_router_topk",
                self.moe_router_topk,
                f"at most the smallest of --num-experts ({min(self.num_experts)})",
            )
        self._check_combinations()

    def _check_combinations(self) -> None:
        if self.moe_layer_freq is not None and self.expert_interval != 1:
            raise ConfigError(
                f"--moe-layer-freq and --expert-interval {self.expert_interval}: give one of them "
                "(--expert-interval 1 is the default)"
            )
        if self.moe_layer_freq is not None and self.moe_first_dense_layers:
            raise ConfigError(
                f"--moe-layer-freq and --moe-first-dense-layers {self.moe_first_dense_layers}: give one of them"
            )
        if self.mlp_type == "residual" and self.num_experts is None:
            raise ConfigError("--mlp-type residual: needs --num-experts")
        if self.mlp_type == "residual" and self.moe_shared_expert_intermediate_size is not None:
            raise ConfigError(
                "--mlp-type residual: cannot be combined with --moe-shared-expert-intermediate-size "
                f"{self.moe_shared_expert_intermediate_size}; the residual MLP is the shared path already"
            )
        self._check_expert_residual()
        if self.moe_pad_expert_input_to_capacity and self.moe_expert_capacity_factor is None:
            raise ConfigError("--moe-pad-expert-input-to-capacity: needs --moe-expert-capacity-factor")
        self._check_capacity()
        self._check_padding()
        rate = self.moe_router_bias_update_rate
        if rate != type(self).moe_router_bias_update_rate and not self.moe_router_enable_expert_bias:
            raise ConfigError(f"--moe-router-bias-update-rate {rate}: needs --moe-router-enable-expert-bias")
        if self.moe_router_enable_expert_bias and self.moe_router_score_function != "sigmoid":
            raise ConfigError("--moe-router-enable-expert-bias: needs --moe-router-score-function sigmoid")
        self._check_router_scores()
        if (self.moe_router_num_groups is None) != (self.moe_router_group_topk is None):
            raise ConfigError("--moe-router-num-groups and --moe-router-group-topk: give both or neither")
        self._check_sinkhorn()
        if self.moe_shared_expert_gate and self.moe_shared_expert_intermediate_size is None:
            raise ConfigError("--moe-shared-expert-gate: needs --moe-shared-expert-intermediate-size")

    def _check_sinkhorn(self) -> None:
        """Sinkhorn takes its own way past the flags that shape scores (upstream `TopKRouter.routing`)."""
        if self.moe_router_load_balancing_type != "sinkhorn":
            return
        if self.moe_aux_loss_coeff > 0:
            raise ConfigError(
                f"--moe-aux-loss-coeff {self.moe_aux_loss_coeff}: must be 0 with "
                "--moe-router-load-balancing-type sinkhorn"
            )
        for name in (
            "moe_expert_capacity_factor",
            "moe_router_enable_expert_bias",
            "moe_router_num_groups",
            "moe_router_topk_scaling_factor",
        ):
            value = getattr(self, name)
            if value:
                raise ConfigError(
                    f"{flag_name(name)} {format_value(value)}: cannot be combined with "
                    "--moe-router-load-balancing-type sinkhorn, which assigns tokens in its own way"
                )

    def _check_expert_residual(self) -> None:
        factor = self.moe_router_topk_scaling_factor
        if not self.use_expert_residual_network:
            default = type(self).expert_residual_layers
            if self.expert_residual_layers != default:
                raise ConfigError(
                    f"--expert-residual-layers {self.expert_residual_layers}: needs --use-expert-residual-network"
                )
        elif factor is not None and factor > 1:
            raise ConfigError(
                f"--moe-router-topk-scaling-factor {factor}: must be at most 1 with --use-expert-residual-network, "
                "which is mixed in by the largest weight"
            )

    def _check_capacity(self) -> None:
        if self.moe_min_capacity and self.moe_expert_capacity_factor is None:
            raise ConfigError(f"--moe-min-capacity {self.moe_min_capacity}: needs --moe-expert-capacity-factor")
        if self.moe_token_drop_policy != "probs" and self.moe_expert_capacity_factor is None:
            raise ConfigError(
                f"--moe-token-drop-policy {self.moe_token_drop_policy}: needs --moe-expert-capacity-factor"
            )
        if self.moe_min_capacity and self.moe_pad_expert_input_to_capacity:
            # token_dispatcher.py:MoEAlltoAllTokenDispatcher.preprocess computes the capacity once more, without it.
            raise ConfigError(
                f"--moe-min-capacity {self.moe_min_capacity}: cannot be combined with "
                "--moe-pad-expert-input-to-capacity; raise --moe-expert-capacity-factor instead"
            )

    def _check_padding(self) -> None:
        # moe_utils.py:apply_router_token_dropping cannot pad an expert's input to more tokens than there are.
        factor = self.moe_expert_capacity_factor
        if factor is None or self.num_experts is None or not self.moe_pad_expert_input_to_capacity:
            return
        largest = min(self.num_experts) / self.moe_router_topk
        require(
            factor <= largest,
            "moe_expert_capacity_factor",
            factor,
            f"at most {largest:g} (the smallest of --num-experts / --moe-router-topk) with "
            "--moe-pad-expert-input-to-capacity",
        )

    def _check_router_scores(self) -> None:
        softmax = self.moe_router_score_function == "softmax"
        if softmax and self.moe_router_topk == 1 and not self.pre_softmax:
            raise ConfigError(
                "--no-moe-router-pre-softmax: needs --moe-router-topk of at least 2; with one expert the "
                "weight would always be 1"
            )
        factor = self.moe_router_topk_scaling_factor
        if factor is not None and softmax and not self.pre_softmax:
            raise ConfigError(
                f"--moe-router-topk-scaling-factor {factor}: needs --moe-router-pre-softmax or "
                "--moe-router-score-function sigmoid"
            )

    @property
    def pre_softmax(self) -> bool:
        """Whether softmax comes before top-k, after the default is applied.

        megatron-core refuses top-1 with softmax after top-k (`topk_routing_with_score_function`): the weight
        would be 1 for every token and the router would get no gradient.
        """
        if self.moe_router_pre_softmax is not None:
            return self.moe_router_pre_softmax
        return self.moe_router_topk == 1

    def experts_per_layer(self, num_layers: int) -> tuple[int, ...]:
        """Experts of every layer in order, 0 for a dense one.

        Raises:
            ConfigError: --num-experts or --moe-layer-freq has a length that does not fit `num_layers`, or no
                layer would be a MoE layer.
        """
        if self.num_experts is None:
            return (0,) * num_layers
        moe_layers = self._moe_layers(num_layers)
        if len(self.num_experts) not in (1, len(moe_layers)):
            numbers = ", ".join(str(number) for number in moe_layers)
            raise ConfigError(
                f"--num-experts {format_value(self.num_experts)}: must be one count, or {len(moe_layers)} "
                f"counts for the MoE layers {numbers}; got {len(self.num_experts)}"
            )
        counts = self.num_experts if len(self.num_experts) > 1 else self.num_experts * len(moe_layers)
        by_layer = dict(zip(moe_layers, counts, strict=True))
        return tuple(by_layer.get(number, 0) for number in range(1, num_layers + 1))

    def _moe_layers(self, num_layers: int) -> tuple[int, ...]:
        """Numbers of the MoE layers, counted from 1; at least one."""
        pattern = self.moe_layer_freq
        first = self.moe_first_dense_layers
        if pattern is None:
            layers = tuple(range(self.expert_interval, num_layers + 1, self.expert_interval))
            require(len(layers) > 0, "expert_interval", self.expert_interval, f"at most --num-layers {num_layers}")
            require(first < layers[-1], "moe_first_dense_layers", first, f"less than {layers[-1]}, the last MoE layer")
            return tuple(number for number in layers if number > first)
        legal = f"one 0 (dense) or 1 (MoE) for each of the {num_layers} layers, with at least one 1"
        valid = len(pattern) == num_layers and set(pattern) <= {0, 1} and 1 in pattern
        require(valid, "moe_layer_freq", pattern, f"{legal}; got {len(pattern)} numbers")
        return tuple(number for number, is_moe in enumerate(pattern, 1) if is_moe)


def check_expert_parallel(experts_per_layer: Sequence[int], expert_parallel_size: int) -> None:
    """Every MoE layer's count must be a multiple of the expert-parallel size, or a divisor (`expert_degree`).

    Args:
        experts_per_layer: experts of every layer in order, 0 for a dense one.
        expert_parallel_size: ranks over which the experts of a layer are spread.

    Raises:
        ConfigError: names the first count that is not, and the layers that have it.
    """
    if expert_parallel_size > 1 and not any(experts_per_layer):
        raise ConfigError(f"--expert-model-parallel-size {expert_parallel_size}: needs --num-experts")
    wrong = [count for count in experts_per_layer if count and expert_degree(count, expert_parallel_size) is None]
    if wrong:
        layers = [str(number) for number, count in enumerate(experts_per_layer, 1) if count == wrong[0]]
        have = f"layers {', '.join(layers)} have" if len(layers) > 1 else f"layer {layers[0]} has"
        raise ConfigError(
            f"--expert-model-parallel-size {expert_parallel_size}: must be a divisor or a multiple of the number of "
            f"experts of every layer; {have} {wrong[0]}"
        )


def expert_degree(experts: int, expert_parallel_size: int) -> int | None:
    """Ranks over which the experts of one layer are spread: all of the expert-parallel size, or, in a layer with fewer
    experts than that, one rank for each expert. None: it does not work out.

    The other ranks hold copies of the same experts, and work on other tokens (DeepSpeed's multi-expert and multi-data
    parallelism, https://arxiv.org/abs/2201.05596).
    """
    if experts % expert_parallel_size == 0:
        return expert_parallel_size
    return experts if expert_parallel_size % experts == 0 else None
