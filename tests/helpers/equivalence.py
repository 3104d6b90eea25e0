"""What may not change the mathematics: the grid of layouts, the switches, how far a run is from one process.

`tests/equivalence/` runs every cell as a test; `tests/equivalence_report.py` runs them to write docs/equivalence.md.

A cell is a training run of three steps, in fp32, of the real trainer. Compared with one process are the losses, the
gradient norms, the tokens per expert, and the final weights, put together from all ranks. Copies of a weight on
several ranks must be equal bit for bit.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_moe.config.base import ConfigError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.validate import validate
from tests.helpers.distributed import run_ranks
from tests.helpers.models import Shard, assemble, shards
from tests.helpers.tiny import data_flags, tiny_run
from tests.helpers.training import Curve, build_trainer, record_curve

TENSOR, PIPELINE = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXPERT, EXPERT_TENSOR = "expert_model_parallel_size", "expert_tensor_parallel_size"
CONTEXT, VIRTUAL = "context_parallel_size", "num_layers_per_virtual_pipeline_stage"
WORLD_SIZES = (1, 2, 4)


# ---- the grid


@dataclass(frozen=True)
class Layout:
    """One way to spread the model over `ranks` processes."""

    ranks: int = 1
    tensor: int = 1
    pipeline: str = "1"
    """`2i` is two stages, interleaved: two chunks of the model on each."""
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1

    @property
    def stages(self) -> int:
        """Pipeline stages."""
        return int(self.pipeline.rstrip("i"))

    @property
    def data(self) -> int:
        """Data-parallel size: what the other sizes leave."""
        return self.ranks // (self.tensor * self.stages * self.context)

    @property
    def name(self) -> str:
        """Short and unique."""
        sizes = f"TP{self.tensor} PP{self.pipeline} EP{self.expert} ETP{self.expert_tensor} CP{self.context}"
        return f"{self.ranks} ranks: {sizes}"

    @property
    def flags(self) -> dict[str, Any]:
        """The sizes as flags."""
        flags = {
            TENSOR: self.tensor,
            PIPELINE: self.stages,
            EXPERT: self.expert,
            EXPERT_TENSOR: self.expert_tensor,
            CONTEXT: self.context,
        }
        return flags | ({VIRTUAL: 1} if self.pipeline.endswith("i") else {})


def combinations() -> list[Layout]:
    """Every combination of the axes, legal or not."""
    axes = itertools.product(WORLD_SIZES, (1, 2), ("1", "2", "2i"), (1, 2, 4), (1, 2), (1, 2))
    return [Layout(*sizes) for sizes in axes]


def refusal(layout: Layout) -> str | None:
    """The error with which the combination is refused, or None if it is legal."""
    try:
        validate(tiny_run(**layout.flags), layout.ranks)
    except ConfigError as error:
        return str(error)
    return None


def legal_layouts() -> list[Layout]:
    """The grid."""
    return [layout for layout in combinations() if refusal(layout) is None]


def refused_layouts() -> dict[str, list[Layout]]:
    """What is not in the grid, by error message."""
    refused: dict[str, list[Layout]] = {}
    for layout in combinations():
        message = refusal(layout)
        if message is not None:
            refused.setdefault(message, []).append(layout)
    return refused


# ---- models that are compared


SMOOTH_ADAM = {"adam_eps": 1e-3}
"""Adam's update is m / (sqrt(v) + eps). With the default eps of 1e-8 every weight whose gradient is only rounding (a
bias on the keys, say, which attention does not see) moves by the full learning rate in a direction that rounding
chooses, and a gradient that is doubled moves its weights no further than a right one. With an eps of the size of a
typical gradient the update is as smooth as the gradient itself, and a wrong factor shows."""

ROTARY = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "disable_bias_linear": True,
    "num_query_groups": 2,
    "qk_layernorm": True,
    "untie_embeddings_and_output_weights": True,
    "mlp_type": "standard",
    "moe_router_topk": 2,
}
FEW_EXPERTS = {"num_experts": (2, 8)}
DENSE = {"num_experts": None, "expert_interval": 1, "mlp_type": "standard"}

FULL = {"moe_expert_capacity_factor": 1.0}
ROUTERS: dict[str, dict[str, Any]] = {
    "topk": {"moe_router_noise": "rsample", "moe_router_topk": 2},
    "large-margin": {"router": "large-margin", "router_margin_beta": 1.0},
    "recycle": {"router": "recycle", **FULL},
    "random-routed": {"router": "random-routed", "num_domains": 2, "domain_embedding": True},
    "hash": {"router": "hash", "mlp_type": "standard"},
    "base": {"router": "base"},
    "expert-choice": {"router": "expert-choice"},
    "token-embedding": {"router": "token-embedding"},
}
"""A router of every kind, as the axis of the grid; each beside residual MLPs unless it says otherwise."""

PARTS: dict[str, dict[str, Any]] = {
    "attention-weight reuse": {"attention_weight_reuse_prob": 0.5, "attention_weight_reuse_span": 2},
    "cross-layer attention": ROTARY | {"cla_share_factor": 2},
    "expert residual network": {"use_expert_residual_network": True, "expert_residual_layers": 2},
    "expert learning rate": {"expert_lr_scale": "auto", "expert_adam_eps": 1e-2},
}
"""Other parts of a layer or of the optimizer."""

MODELS: dict[str, dict[str, Any]] = {
    "pyramid-residual": SMOOTH_ADAM,
    "rotary": ROTARY | SMOOTH_ADAM,
    "shared expert": ROTARY | SMOOTH_ADAM | {"moe_shared_expert_intermediate_size": 24},
    "few experts": FEW_EXPERTS | SMOOTH_ADAM,
    "few experts, top-2": ROTARY | FEW_EXPERTS | SMOOTH_ADAM,
    "by domain": SMOOTH_ADAM
    | {"router": "random-routed", "num_domains": 2, "moe_token_dispatcher_type": "grouped"}
    | {"moe_domain_grouped": True},
    "dense": DENSE | SMOOTH_ADAM,
    "one micro-batch": SMOOTH_ADAM | {"micro_batch_size": 8, "moe_aux_loss_coeff": 0.0},
    "default epsilon": {},
    **{f"router {name}": SMOOTH_ADAM | flags for name, flags in ROUTERS.items()},
    **{name: SMOOTH_ADAM | flags for name, flags in PARTS.items()},
}
"""Flags of the run that each group of cells is compared with, which is always one process:
pyramid-residual: learned positions, LayerNorm, GELU, biases, tied embeddings, top-1 of 4 and of 8 experts beside a
residual MLP in layers 2 and 4, auxiliary loss. rotary: rotary positions, RMSNorm, SwiGLU, no biases, grouped queries,
norms of queries and keys, untied embeddings, top-2. few experts: 2 and 8 of them, so that a layer has fewer than
there are ranks. by domain: sequences go to the ranks of their domain's experts. one micro-batch: the whole batch in one
pass; without the auxiliary loss, which is a product of two means over a micro-batch and so not additive."""


@dataclass(frozen=True)
class Tolerance:
    """Largest relative deviations that pass."""

    loss: float
    grad_norm: float
    weights: float
    measure: str = "largest"
    """How a tensor's error and change are measured: `largest` element or `rms`."""


FP32 = Tolerance(loss=1e-6, grad_norm=3e-6, weights=2e-4)
"""Half a unit in the last place of fp32 is u = 6e-8 of a value. A sum of n terms in another order moves by about
sqrt(n) u, n being tens to hundreds here, and three steps pass that on. Losses are means over 256 tokens: 16 u. Norms
are dominated by the largest gradients: 50 u. Weights are compared with how far training has moved their tensor: a
norm's weight is 1 and moves by 0.002, so its own rounding is already 3e-5 of that."""

LEAST_CHANGE = 1e-3
"""Of a tensor's values: what moves less is measured as if it had moved by that, since one unit in the last place would
be more than the tolerance otherwise. The norms of an expert residual network, which starts as the identity, move by
9e-5; a gradient that is wrong by a tenth still shows there."""

DEFAULT_EPSILON = Tolerance(loss=1e-6, grad_norm=2e-5, weights=3e-3, measure="rms")
"""With Adam's default eps single weights are free, see `SMOOTH_ADAM`: a tensor's error is measured as a whole (root
mean square against the root mean square of its change)."""


# ---- cells


@dataclass(frozen=True)
class Cell:
    """A run that must equal one process."""

    group: str
    name: str
    ranks: int
    flags: Mapping[str, Any]
    model: str = "pyramid-residual"

    @property
    def tolerance(self) -> Tolerance:
        """What passes."""
        return DEFAULT_EPSILON if self.model == "default epsilon" else FP32

    def run(self, data: Mapping[str, Any]) -> RunConfig:
        """The whole run."""
        return tiny_run(**{**data, **MODELS[self.model], **self.flags})


class Trained(NamedTuple):
    """What a rank hands back."""

    curve: Curve
    start: list[Shard]
    end: list[Shard]


@dataclass(frozen=True)
class Whole:
    """What all ranks report, with whole tensors."""

    curves: list[Curve]
    start: dict[str, np.ndarray]
    end: dict[str, np.ndarray]


@dataclass(frozen=True)
class Deviation:
    """How far a run is from its reference; relative numbers, the largest over steps, ranks and tensors."""

    loss: float
    grad_norm: float
    weights: float
    tensor: str
    """Whose weights are furthest off."""
    loads: bool
    """Whether every expert of every layer got as many tokens, in every step."""
    start: bool
    """Whether the weights at the start were equal bit for bit."""

    def failures(self, tolerance: Tolerance) -> list[str]:
        """What does not pass, in words."""
        found = [
            f"{name}: off by {value:.1e}, more than {limit:.0e}"
            for name, value, limit in (
                ("loss", self.loss, tolerance.loss),
                ("grad norm", self.grad_norm, tolerance.grad_norm),
                (f"weights ({self.tensor})", self.weights, tolerance.weights),
            )
            if not value <= limit
        ]
        found += [] if self.loads else ["tokens per expert differ"]
        return found if self.start else [*found, "initial weights differ"]


def train_cell(run: RunConfig, fault: Callable[[Any], None] | None = None) -> Trained:
    """On a rank: train to the end. A fault damages the trainer before the first step."""
    trainer = build_trainer(run)
    start = shards(trainer.model)
    if fault is not None:
        fault(trainer)
    curve = record_curve(trainer)
    trainer._gather_parameters()
    return Trained(curve, start, shards(trainer.model))


def train_whole(run: RunConfig, ranks: int, fault: Callable[[Any], None] | None = None) -> Whole:
    """Train on that many ranks and put the weights together; copies that differ are an error."""
    trained = run_ranks(ranks, train_cell, run, fault)
    start, end = (assemble([getattr(rank, name) for rank in trained]) for name in ("start", "end"))
    return Whole([rank.curve for rank in trained], start, end)


def deviation(whole: Whole, reference: Whole, measure: str = "largest") -> Deviation:
    """Compare two runs of the same steps."""
    (expected,) = reference.curves
    assert len(expected.losses) == 3, "the reference must have made its three steps"
    assert set(whole.end) == set(reference.end)
    size = (
        (lambda tensor: np.abs(tensor).max()) if measure == "largest" else (lambda tensor: np.sqrt((tensor**2).mean()))
    )
    errors = {
        key: float(
            size(whole.end[key] - tensor) / max(size(tensor - reference.start[key]), LEAST_CHANGE * size(tensor))
        )
        for key, tensor in reference.end.items()
    }
    furthest = max(errors, key=lambda key: errors[key])
    return Deviation(
        loss=max(relative(curve.losses, expected.losses) for curve in whole.curves),
        grad_norm=max(relative(curve.grad_norms, expected.grad_norms) for curve in whole.curves),
        weights=errors[furthest],
        tensor=furthest,
        loads=all(curve.loads == expected.loads for curve in whole.curves),
        start=all(np.array_equal(whole.start[key], tensor) for key, tensor in reference.start.items()),
    )


def relative(values: Iterable[float], expected: Iterable[float]) -> float:
    """Largest relative difference; as many values on both sides."""
    return max(abs(value - wanted) / abs(wanted) for value, wanted in zip(values, expected, strict=True))


@dataclass
class Comparison:
    """Runs cells on the token files in a folder, and each reference once."""

    folder: Path
    references: dict[str, Whole] = field(default_factory=dict)

    @cached_property
    def data(self) -> dict[str, Any]:
        """Flags of the data."""
        return data_flags(self.folder)

    def reference(self, model: str) -> Whole:
        """One process."""
        if model not in self.references:
            self.references[model] = train_whole(tiny_run(**{**self.data, **MODELS[model]}), 1)
        return self.references[model]

    def measure(self, cell: Cell, fault: Callable[[Any], None] | None = None) -> Deviation:
        """Run a cell and compare it."""
        whole = train_whole(cell.run(self.data), cell.ranks, fault)
        return deviation(whole, self.reference(cell.model), cell.tolerance.measure)
