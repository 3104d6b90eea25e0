"""Flags of single routers (`--router-...`), and which router knows which flag.

A flag set for a router that does not know it is refused, as is a flag of `moe.py` that has no meaning for the router
that was chosen: nothing is ignored.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from megatron_moe.config.base import ConfigError, flag_name, format_value, require, require_fraction, require_positive
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.sharing import check_sharing


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Flags that belong to one router or two."""

    router_margin_type: Literal["lsoftmax", "additive", "elsayed"] = "lsoftmax"
    """large-margin: L-Softmax (PAI's released code), additive margin on the cosine, or the distance to the decision
    boundary as a loss (Elsayed et al. 2018, the paper PAI cites)."""
    router_margin: float | None = None
    """large-margin: the margin. lsoftmax: an integer m from 1 (no margin) to 4, default 2; additive: a cosine, default
    0.2; elsayed: a distance, default 1."""
    router_margin_target: Literal["round_robin", "self", "balanced"] | None = None
    """large-margin: the expert whose logit gets the margin: number of the token in its micro-batch modulo experts
    (PAI's released code), the one of its largest logit, or that of a balanced assignment of the micro-batch. Default:
    round_robin; with elsayed self."""
    router_margin_gate: bool = False
    """large-margin: weigh the experts' outputs with the margined scores too (PAI's released code). Default: the margin
    decides on the choice and the balancing loss only."""
    router_margin_beta: float = 100.0
    """large-margin: weight of the plain logit beside the margined one at step 0."""
    router_margin_beta_decay: float = 0.99
    """large-margin: factor on that weight every step."""
    router_margin_beta_min: float = 0.0
    """large-margin: what the weight does not fall below."""
    router_margin_scale: float | None = None
    """large-margin, additive: the logits are cosines times this scale, in training and outside of it. Default: the
    norms of token and expert."""
    router_margin_loss_coeff: float = 0.01
    """large-margin, elsayed: weight of the margin loss."""
    router_map: Literal["uniform", "balanced"] = "uniform"
    """hash, random-routed: draw every token id's expert uniformly, or so that experts get equal shares of the text
    (needs --router-token-counts)."""
    router_token_counts: str | None = None
    """hash, random-routed: how often each token id occurs, written by tools/preprocess_data.py counts. Read when a
    run starts; checkpoints hold the map."""
    router_domain_shares: tuple[int, ...] | None = None
    """random-routed: experts of each domain, as shares; every layer's count must be a multiple of their sum. With
    --moe-domain-grouped also its sequences in a step. Default: equal shares for the --num-domains domains."""
    router_embedding_size: int = 64
    """token-embedding: width of the routing embedding."""
    router_embedding_shared: bool = True
    """token-embedding: one routing embedding and one gate for all layers with the same number of experts."""
    router_cutoff_decay: float = 0.99
    """expert-choice: decay of the running mean of every expert's lowest accepted score, which decides outside of
    training."""

    def __post_init__(self) -> None:
        require_positive(self, "router_embedding_size")
        for name in ("router_margin_beta", "router_margin_beta_min", "router_margin_loss_coeff"):
            require(getattr(self, name) >= 0.0, name, getattr(self, name), "at least 0")
        self._check_margin()
        decay = self.router_margin_beta_decay
        require(0.0 < decay <= 1.0, "router_margin_beta_decay", decay, "greater than 0 and at most 1")
        require_fraction(self, "router_cutoff_decay")
        if self.router_map == "uniform" and self.router_token_counts is not None:
            raise ConfigError(f"--router-token-counts {self.router_token_counts}: needs --router-map balanced")

    def _check_margin(self) -> None:
        kind, margin, scale = self.router_margin_type, self.margin, self.router_margin_scale
        if kind == "lsoftmax":
            require(margin in (1, 2, 3, 4), "router_margin", margin, "1, 2, 3 or 4 with --router-margin-type lsoftmax")
        elif kind == "additive":
            require(0.0 <= margin < 1.0, "router_margin", margin, "in [0, 1) with --router-margin-type additive")
        else:
            require(margin > 0.0, "router_margin", margin, "greater than 0 with --router-margin-type elsayed")
        require(scale is None or scale > 0.0, "router_margin_scale", scale, "greater than 0")
        for field in fields(self):
            value, kinds = getattr(self, field.name), _MARGIN_TYPES.get(field.name, (kind,))
            if value != field.default and kind not in kinds:
                raise ConfigError(
                    f"{flag_name(field.name)} {format_value(value)}: belongs to --router-margin-type "
                    f"{' or '.join(kinds)}, not to {kind}"
                )

    @property
    def margin(self) -> float:
        """--router-margin, after the default is applied."""
        if self.router_margin is not None:
            return self.router_margin
        return {"lsoftmax": 2.0, "additive": 0.2, "elsayed": 1.0}[self.router_margin_type]

    @property
    def margin_target(self) -> str:
        """--router-margin-target, after the default is applied."""
        return self.router_margin_target or ("self" if self.router_margin_type == "elsayed" else "round_robin")

    @property
    def has_margin(self) -> bool:
        """Whether the margin flags ask for anything at all: L-Softmax with 1, say, is the plain softmax."""
        nothing = {"lsoftmax": self.margin == 1, "additive": self.margin == 0}
        return not nothing.get(self.router_margin_type, self.router_margin_loss_coeff == 0)


_MARGIN_TYPES: dict[str, tuple[str, ...]] = {
    "router_margin_beta": ("lsoftmax",),
    "router_margin_beta_decay": ("lsoftmax",),
    "router_margin_beta_min": ("lsoftmax",),
    "router_margin_scale": ("additive",),
    "router_margin_gate": ("lsoftmax", "additive"),
    "router_margin_loss_coeff": ("elsayed",),
}
"""Field of `RoutingConfig` -> the margin types that read it."""

KNOWN_BY: dict[str, tuple[str, ...]] = {
    "router_margin": ("large-margin",),
    "router_map": ("hash", "random-routed"),
    "router_token_counts": ("hash", "random-routed"),
    "router_domain_shares": ("random-routed",),
    "router_embedding": ("token-embedding",),
    "router_cutoff": ("expert-choice",),
}
"""Beginning of a field of `RoutingConfig` -> the routers that read it."""


def domain_groups(experts: int, domains: int, shares: tuple[int, ...] | None) -> list[range]:
    """The experts of every domain in a layer: neighbours, in the order of the domains.

    Args:
        experts: of the layer; a multiple of the sum of the shares.
        domains: how many there are.
        shares: experts of each domain, relative to each other; None: equal.
    """
    shares = shares or (1,) * domains
    unit = experts // sum(shares)
    starts = [unit * sum(shares[:domain]) for domain in range(domains + 1)]
    return [range(*bounds) for bounds in itertools.pairwise(starts)]


def check_domains(
    moe: MoEConfig, routing: RoutingConfig, domains: int | None, experts_per_layer: Sequence[int]
) -> None:
    """random-routed needs domains, one expert a token, and experts that its groups divide.

    Args:
        moe: names the router.
        routing: its flags.
        domains: --num-domains.
        experts_per_layer: 0 for a dense layer.

    Raises:
        ConfigError: something does not fit; names the flag.
    """
    if moe.router != "random-routed":
        return
    if domains is None:
        raise ConfigError("--router random-routed: needs --num-domains")
    require(moe.moe_router_topk == 1, "moe_router_topk", moe.moe_router_topk, "1 with --router random-routed")
    shares = routing.router_domain_shares
    if shares is not None and (len(shares) != domains or min(shares) < 1):
        raise ConfigError(
            f"--router-domain-shares {format_value(shares)}: must be {domains} numbers of at least 1, one for each of "
            "the --num-domains domains"
        )
    parts = sum(shares) if shares else domains
    for number, count in enumerate(experts_per_layer, 1):
        if count % parts:
            what = f"--router-domain-shares {format_value(shares)}" if shares else f"--num-domains {domains}"
            raise ConfigError(
                f"{what}: every layer's experts must be a multiple of {parts}, the sum of the shares; layer {number} "
                f"has {count}"
            )


_GATE = (
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_enable_expert_bias",
    "moe_router_bias_update_rate",
    "moe_router_dtype",
    "moe_input_jitter_eps",
    "moe_router_noise",
)
# Experts of a fixed map have no scores to drop tokens by: they take what comes.
_CAPACITY = (
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_min_capacity",
    "moe_token_drop_policy",
)
# A learned gate's scores that are shared out in another way than the top k of each token.
_SCORES = tuple(name for name in _GATE if name not in ("moe_router_dtype", "moe_input_jitter_eps"))
MEANINGLESS: dict[str, tuple[str, ...]] = {
    "recycle": ("moe_pad_expert_input_to_capacity", "moe_router_num_groups", "moe_router_group_topk"),
    "base": _SCORES + _CAPACITY,
    "expert-choice": (
        *(name for name in _SCORES if name != "moe_z_loss_coeff"),  # Softmax over experts has a z-loss.
        "moe_pad_expert_input_to_capacity",
        "moe_token_drop_policy",
    ),
    "hash": _GATE + _CAPACITY,
    "random-routed": _GATE + _CAPACITY,
    "token-embedding": ("moe_input_jitter_eps",),
}
"""Router -> fields of `MoEConfig` that it cannot use; they must keep their defaults."""


def check_routing(moe: MoEConfig, routing: RoutingConfig) -> None:
    """Refuse flags that the chosen router does not know.

    Raises:
        ConfigError: names the flag and the routers that have it.
    """
    for field in fields(routing):
        value = getattr(routing, field.name)
        routers = next(names for beginning, names in KNOWN_BY.items() if field.name.startswith(beginning))
        if value != field.default and moe.router not in routers:
            raise ConfigError(
                f"{flag_name(field.name)} {format_value(value)}: belongs to --router {' or '.join(routers)}, "
                f"not to {moe.router}"
            )
    check_sharing(moe)
    if moe.moe_router_load_balancing_type == "sinkhorn":
        # Upstream's `TopKRouter.sinkhorn_load_balancing` assigns by the plain logits.
        for flag, wanted in (
            ("--router large-margin", moe.router == "large-margin"),
            ("--moe-router-noise rsample", moe.moe_router_noise == "rsample"),
        ):
            if wanted:
                raise ConfigError(
                    f"{flag}: cannot be combined with --moe-router-load-balancing-type sinkhorn, which "
                    "assigns tokens in its own way"
                )
    unused = MEANINGLESS.get(moe.router, ())
    for field in fields(moe):
        value = getattr(moe, field.name)
        if field.name in unused and value != field.default:
            raise ConfigError(
                f"{flag_name(field.name)} {format_value(value)}: has no meaning for --router {moe.router}"
            )
