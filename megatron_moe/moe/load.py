"""How evenly a layer's experts are loaded, in a few numbers. No torch here.

Shape legend: E = experts of a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerLoad:
    """Load of one MoE layer over a step, all ranks together."""

    layer: int
    """Counted from 1."""
    tokens: list[int]
    """[E] token assignments that each expert processed."""
    dropped: int
    """Assignments that found their expert full and were not made."""
    recycled: int = 0
    """Assignments that found their expert full and went to another, where `tokens` counts them."""

    @property
    def asked(self) -> int:
        """Assignments that the router asked for."""
        return sum(self.tokens) + self.dropped

    def row(self) -> dict[str, Any]:
        """What a line of expert_load.jsonl holds beside the step."""
        counts = {"layer": self.layer, "tokens": self.tokens, "dropped": self.dropped, "recycled": self.recycled}
        return counts | self.shares()

    def shares(self) -> dict[str, float]:
        """Numbers that can be compared between layers, by name."""
        asked = max(1, self.asked)
        return {
            "load_cv": variation(self.tokens),
            "load_entropy": entropy(self.tokens),
            "dropped_share": self.dropped / asked,
            "recycled_share": self.recycled / asked,
        }


def imbalance(tokens: Sequence[float]) -> float:
    """Largest expert's load over the mean; 1 is perfect balance, 0 means no tokens at all."""
    total = sum(tokens)
    return max(tokens) * len(tokens) / total if total else 0.0


def variation(tokens: Sequence[float]) -> float:
    """Coefficient of variation: standard deviation over mean; 0 is perfect balance, sqrt(E - 1) one expert alone."""
    mean = sum(tokens) / len(tokens)
    if not mean:
        return 0.0
    return math.sqrt(sum((count - mean) ** 2 for count in tokens) / len(tokens)) / mean


def entropy(tokens: Sequence[float]) -> float:
    """Entropy of the load over ln E: 1 is perfect balance, 0 one expert alone (or no tokens at all)."""
    total = sum(tokens)
    if not total:
        return 0.0
    if len(tokens) == 1:
        return 1.0
    return -sum(n / total * math.log(n / total) for n in tokens if n) / math.log(len(tokens))


def mean_shares(loads: Sequence[LayerLoad]) -> dict[str, float]:
    """Means over the layers, as metrics.jsonl names them; nothing for a model without experts."""
    names = {
        "moe_load_cv": "load_cv",
        "moe_load_entropy": "load_entropy",
        "moe_dropped": "dropped_share",
        "moe_recycled": "recycled_share",
    }
    shares = [load.shares() for load in loads]
    return {name: sum(share[key] for share in shares) / len(shares) for name, key in names.items() if shares}


def scalars(loads: Sequence[LayerLoad]) -> dict[str, float]:
    """A few numbers of every layer, by their names in TensorBoard and Weights & Biases."""
    found: dict[str, float] = {}
    for load in loads:
        shares = load.shares()
        found |= {
            f"moe/imbalance_layer_{load.layer}": imbalance(load.tokens),
            f"moe/load_cv_layer_{load.layer}": shares["load_cv"],
            f"moe/load_entropy_layer_{load.layer}": shares["load_entropy"],
            f"moe/dropped_layer_{load.layer}": shares["dropped_share"],
            f"moe/recycled_layer_{load.layer}": shares["recycled_share"],
        }
    return found
