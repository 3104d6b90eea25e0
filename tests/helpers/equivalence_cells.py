"""The cells of docs/equivalence.md: every legal layout, and every switch that must not change the mathematics."""

import dataclasses
import itertools
from typing import Any

from megatron_moe.config.base import ConfigError
from tests.helpers.equivalence import (
    CONTEXT,
    EXPERT,
    EXPERT_TENSOR,
    PARTS,
    PIPELINE,
    ROUTERS,
    TENSOR,
    VIRTUAL,
    Cell,
    Layout,
    legal_layouts,
)
from tests.helpers.tiny import tiny_run

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {TENSOR: 2}),
    "TP2 DP2": (4, {TENSOR: 2}),
    "PP2": (2, {PIPELINE: 2}),
    "PP2 DP2": (4, {PIPELINE: 2}),
    "PP2i": (2, {PIPELINE: 2, VIRTUAL: 1}),
    "PP2i DP2": (4, {PIPELINE: 2, VIRTUAL: 1}),
    "EP2": (2, {EXPERT: 2}),
    "EP2 DP4": (4, {EXPERT: 2}),
    "EP4": (4, {EXPERT: 4}),
    "ETP2": (2, {EXPERT_TENSOR: 2}),
    "CP2": (2, {CONTEXT: 2}),
    "CP2 DP2": (4, {CONTEXT: 2}),
    "CP2 EP2": (2, {CONTEXT: 2, EXPERT: 2}),
    "TP2 EP2 ETP1": (2, {TENSOR: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
    "TP2 EP4 ETP1": (4, {TENSOR: 2, EXPERT: 4, EXPERT_TENSOR: 1}),
    "CP2 EP4": (4, {CONTEXT: 2, EXPERT: 4}),
    "TP2 EP2 ETP1 DP2": (4, {TENSOR: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
    "TP2 EP2 ETP2": (4, {TENSOR: 2, EXPERT: 2}),
    "PP2 EP2": (4, {PIPELINE: 2, EXPERT: 2}),
    "PP2i EP2": (4, {PIPELINE: 2, VIRTUAL: 1, EXPERT: 2}),
    "TP2 PP2": (4, {TENSOR: 2, PIPELINE: 2}),
    "TP2 PP2 EP2 ETP1": (4, {TENSOR: 2, PIPELINE: 2, EXPERT: 2, EXPERT_TENSOR: 1}),
}
"""Layouts in which switches are tried. TP2 means ETP2 where ETP is not named: that is the default."""


def cells(
    group: str, switch: str, flags: dict[str, Any], layouts: list[str], model: str = "pyramid-residual"
) -> list[Cell]:
    """One switch in several layouts."""
    found = []
    for layout in layouts:
        ranks, sizes = LAYOUTS[layout]
        name = f"{switch}: {layout}" if switch else layout
        found.append(Cell(group, name, ranks, {**flags, **sizes}, model))
    return found


def grid() -> list[Cell]:
    """Every legal layout of up to four ranks but one process itself."""
    return [Cell("grid", layout.name, layout.ranks, layout.flags) for layout in legal_layouts() if layout.ranks > 1]


def pairs(layout: Layout) -> set[tuple[tuple[str, Any], ...]]:
    """Every two axes' values of a layout, the data-parallel size among them."""
    axes = {**dataclasses.asdict(layout), "data": layout.data}
    return set(itertools.combinations(axes.items(), 2))


def covering_layouts() -> list[Layout]:
    """A part of the grid that holds every pair of two axes' values that the grid holds; chosen greedily."""
    left = [layout for layout in legal_layouts() if layout.ranks > 1]
    missing = set().union(*map(pairs, left))
    chosen = []
    while missing:
        best = max(left, key=lambda layout: len(pairs(layout) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def cells_under_test() -> list[Cell]:
    """What `make test` runs: every switch, and of the grid the layouts that cover all pairs."""
    names = {layout.name for layout in covering_layouts()}
    chosen = [cell for cell in all_cells() if cell.group not in ("grid", "routers and parts") or cell.name in names]
    return chosen + [cell for cell in routers() if cell.name.split(": ")[1] in ROUTER_LAYOUTS_UNDER_TEST]


ZERO1 = {"use_distributed_optimizer": True}
OVERLAP = ZERO1 | {"overlap_grad_reduce": True, "overlap_param_gather": True}


def optimizers() -> list[Cell]:
    """The distributed optimizer, and communication that overlaps with computing."""
    group = "distributed optimizer"
    everywhere = ["DP2", "TP2 DP2", "PP2 DP2", "PP2i DP2", "EP2", "EP2 DP4", "EP4", "ETP2", "CP2", "CP2 DP2"]
    return [
        *cells(group, "ZeRO-1", ZERO1, [*everywhere, "TP2 EP2 ETP1 DP2", "TP2 EP2 ETP2", "PP2 EP2"]),
        *cells(group, "overlapped reduction", {"overlap_grad_reduce": True}, ["DP2", "PP2i DP2", "EP2 DP4"]),
        *cells(
            group,
            "ZeRO-1, overlapped reduction and gathers",
            OVERLAP,
            ["DP2", "PP2 DP2", "PP2i DP2", "EP2 DP4", "TP2 EP2 ETP1 DP2", "CP2 DP2"],
        ),
    ]


def full(method: str, layers: int) -> dict[str, Any]:
    """Recompute of whole layers."""
    return {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}


def selective(*modules: str) -> dict[str, Any]:
    """Recompute of parts of every layer."""
    return {"recompute_granularity": "selective", "recompute_modules": modules}


def recompute() -> list[Cell]:
    """Every mode alone, and in layouts whose communication it repeats."""
    group = "recompute"
    return [
        *cells(group, "full, uniform 1", full("uniform", 1), ["one process", "TP2 EP2 ETP1", "PP2i EP2", "CP2 EP2"]),
        *cells(group, "full, uniform 2", full("uniform", 2), ["one process", "PP2"]),
        *cells(group, "full, block 1", full("block", 1), ["PP2i", "TP2 EP2 ETP2"]),
        *cells(group, "full, block 2", full("block", 2), ["one process", "EP2"]),
        *cells(group, "core_attn", selective("core_attn"), ["one process", "TP2", "CP2"]),
        *cells(group, "mlp", selective("mlp"), ["one process", "TP2", "PP2"]),
        *cells(group, "moe", selective("moe"), ["one process", "EP2", "TP2 EP2 ETP1", "TP2 EP2 ETP2", "PP2 EP2"]),
        *cells(group, "core_attn, mlp, moe", selective("core_attn", "mlp", "moe"), ["one process", "EP4", "PP2i"]),
        *cells(
            group,
            "shared_experts",
            selective("shared_experts"),
            ["one process", "TP2 EP2 ETP1", "EP2"],
            model="shared expert",
        ),
        *cells(group, "full with ZeRO-1, overlapped", full("uniform", 1) | OVERLAP, ["EP2 DP4"]),
    ]


def accumulation() -> list[Cell]:
    """Micro-batches of one or two samples, against the whole batch of eight in one pass."""
    flags = {"moe_aux_loss_coeff": 0.0}
    one, two = ({**flags, "micro_batch_size": size} for size in (1, 2))
    model = "one micro-batch"
    return [
        *cells("accumulation", "8 x 1", one, ["one process", "PP2", "PP2i"], model),
        *cells("accumulation", "4 x 2", two, ["one process", "EP2", "TP2", "CP2"], model),
        *cells("accumulation", "ZeRO-1, 4 x 2", {**one, **ZERO1}, ["EP2"], model),
        *cells("accumulation", "ZeRO-1, overlapped, 4 x 2", {**one, **OVERLAP}, ["DP2"], model),
    ]


def dispatchers() -> list[Cell]:
    """The other way for tokens to reach their experts' ranks, and the other attention."""
    gather = {"moe_token_dispatcher_type": "allgather"}
    layouts = ["one process", "EP2", "EP4", "ETP2", "CP2 EP2", "TP2 EP2 ETP1", "TP2 EP2 ETP2", "PP2 EP2"]
    return [
        *cells("dispatcher and attention", "allgather dispatcher", gather, layouts),
        *cells(
            "dispatcher and attention", "unfused attention", {"attention_backend": "unfused"}, ["one process", "TP2"]
        ),
    ]


def experts() -> list[Cell]:
    """What computes the experts: the loop, against the stacked weights that all other cells have."""
    loop = {"moe_expert_backend": "sequential"}
    layouts = ["one process", "EP2", "ETP2", "TP2 EP2 ETP2", "PP2 EP2"]
    return [
        *cells("experts", "sequential", loop, layouts),
        *cells("experts", "sequential, top-2, SwiGLU", loop, ["one process", "EP4", "TP2 EP2 ETP1"], "rotary"),
        *cells("experts", "sequential, ZeRO-1", {**loop, **ZERO1}, ["EP2 DP4"]),
    ]


def node(ranks: int) -> dict[str, Any]:
    """The grouped dispatcher on nodes of so many ranks."""
    return {"moe_token_dispatcher_type": "grouped", "ranks_per_node": ranks}


def grouped_exchange() -> list[Cell]:
    """The exchange between and inside of nodes, and by domain."""
    group = "grouped all-to-all"
    return [
        *cells(group, "nodes of 1", node(1), ["one process", "EP4", "TP2 EP2 ETP1"]),
        *cells(group, "nodes of 2", node(2), ["EP2", "EP4", "CP2 EP2", "PP2 EP2", "TP2 EP2 ETP2"]),
        *cells(group, "nodes of 2, top-2", node(2), ["EP4", "TP2 PP2 EP2 ETP1"], "rotary"),
        *cells(group, "nodes of 2, full recompute", node(2) | full("uniform", 1), ["EP4"]),
        *cells(group, "nodes of 4", node(4), ["EP4", "EP2 DP4"]),
        *cells(group, "by domain", {}, ["EP2", "EP2 DP4", "PP2 EP2"], "by domain"),
    ]


def few_experts() -> list[Cell]:
    """A layer with fewer experts than expert-parallel ranks, which hold copies of them."""
    group, model = "fewer experts than ranks", "few experts"
    gather = {"moe_token_dispatcher_type": "allgather"}
    return [
        *cells(group, "", {}, ["EP4", "TP2 EP4 ETP1", "CP2 EP4"], model),
        *cells(group, "top-2", {}, ["EP4", "TP2 EP4 ETP1"], "few experts, top-2"),
        *cells(group, "ZeRO-1", ZERO1, ["EP4"], model),
        *cells(group, "ZeRO-1, overlapped", OVERLAP, ["EP4"], model),
        *cells(group, "full recompute", full("uniform", 1), ["EP4"], model),
        *cells(group, "nodes of 2", node(2), ["EP4"], model),
        *cells(group, "allgather", gather, ["EP4"], model),
    ]


def sequence_parallel() -> list[Cell]:
    """A dense model, which may go without; with experts under tensor parallelism it is always on."""
    on, off = {"sequence_parallel": True}, {"sequence_parallel": False}
    return [
        *cells("sequence parallel", "off, dense", off, ["TP2", "TP2 PP2"], "dense"),
        *cells("sequence parallel", "on, dense", on, ["TP2", "TP2 PP2"], "dense"),
        *cells("sequence parallel", "on, asked for", on, ["TP2"]),
    ]


def second_model() -> list[Cell]:
    """Rotary positions, RMSNorm, SwiGLU, grouped queries, untied embeddings, top-2 experts without biases."""
    layouts = ["DP2", "TP2", "PP2", "PP2i", "EP4", "ETP2", "CP2", "TP2 EP2 ETP2", "TP2 PP2 EP2 ETP1", "CP2 EP2"]
    return [
        *cells("rotary, top-2", "", {}, layouts, "rotary"),
        *cells("rotary, top-2", "ZeRO-1", ZERO1, ["EP2 DP4"], "rotary"),
        *cells("rotary, top-2", "shared expert", {}, ["TP2 EP2 ETP1", "PP2 EP2"], "shared expert"),
    ]


def default_epsilon() -> list[Cell]:
    """Adam as it is by default, measured by tensor."""
    layouts = ["DP2", "TP2", "PP2i", "EP4", "CP2", "TP2 PP2 EP2 ETP1"]
    return cells("Adam's default epsilon", "", {}, layouts, "default epsilon")


ROUTER_LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2 PP2 EP2 ETP1": {},
    "CP2 EP2": full("uniform", 1),
    "PP2i DP2": OVERLAP,
    "TP2 EP2 ETP2": selective("moe"),
    "TP2 DP2": ZERO1,
    "PP2 EP2": {},
    "CP2 DP2": {},
    "EP4": {},
}
"""Layouts that cut a micro-batch up in every way, some with another switch."""

ROUTER_LAYOUTS_UNDER_TEST = ("TP2 PP2 EP2 ETP1", "CP2 EP2")
"""What `make test` runs of every router; tests beside the routers run others."""


def routers() -> list[Cell]:
    """Every router, and the other parts that change a layer, under every kind of layout."""
    found = []
    for model in (*(f"router {name}" for name in ROUTERS), *PARTS):
        for layout, switch in ROUTER_LAYOUTS.items():
            if model in ("attention-weight reuse", "cross-layer attention") and VIRTUAL in LAYOUTS[layout][1]:
                # Virtual stages hold one layer here, and these hand something on from a layer to the next.
                continue
            # A routing embedding gets its gradient from all layers, so its reduction cannot overlap: refused by name.
            shared = model == "router token-embedding" and switch is OVERLAP
            found += cells("routers and parts", model, ZERO1 if shared else switch, [layout], model)
    return found


def all_cells() -> list[Cell]:
    """Every cell, in the order of the page."""
    return [
        *grid(),
        *optimizers(),
        *recompute(),
        *accumulation(),
        *dispatchers(),
        *experts(),
        *grouped_exchange(),
        *few_experts(),
        *sequence_parallel(),
        *second_model(),
        *default_epsilon(),
        *routers(),
    ]


REFUSED_SWITCHES: dict[str, dict[str, Any]] = {
    "sequence parallel without tensor parallel": {"sequence_parallel": True},
    "selective recompute of norms": selective("layernorm"),
    "selective recompute of the experts' activation": selective("moe_act"),
    "selective recompute of an absent shared expert": selective("shared_experts"),
    "gathers that overlap without ZeRO-1": {"overlap_param_gather": True, "overlap_grad_reduce": True},
    "ZeRO-1 with SGD": {**ZERO1, "optimizer": "sgd"},
    "unfused attention under context parallelism": {"attention_backend": "unfused", CONTEXT: 2},
    "a shared routing embedding with overlapped reduction": {"router": "token-embedding", **OVERLAP},
    "attention weights reused across pipeline stages": {"attention_weight_reuse_prob": 0.5, PIPELINE: 2},
    "keys and values shared across pipeline stages": {"cla_share_factor": 4, PIPELINE: 2},
    "recycling without a capacity": {"router": "recycle"},
    "3 experts on 2 ranks": {EXPERT: 2, "num_experts": (3, 8)},
    "nodes of other sizes with another dispatcher": {"ranks_per_node": 2},
    "domains apart with another router": {"moe_domain_grouped": True, "moe_token_dispatcher_type": "grouped"},
    "a gate's flag with a router that has none": {"router": "hash", "moe_z_loss_coeff": 1e-3},
}
"""Switches that the configuration does not allow on a CPU, each with an error."""


def refused_switches() -> dict[str, str]:
    """The error of each."""
    from megatron_moe.config.validate import validate

    messages = {}
    for name, flags in REFUSED_SWITCHES.items():
        try:
            validate(tiny_run(**flags), 2)
        except ConfigError as error:
            messages[name] = str(error)
    return messages
