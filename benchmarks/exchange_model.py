"""From which number of ranks on does the hierarchical exchange of tokens win? An alpha-beta model, 8 to 4,096 ranks.

    python benchmarks/exchange_model.py                                  # tables for the machines below
    python benchmarks/exchange_model.py --plot docs/img                  # and pictures
    python benchmarks/exchange_model.py --measure --ranks 4 --ranks-per-node 2      # on this machine's own numbers
    torchrun --nnodes 4 --nproc-per-node 8 ... benchmarks/exchange_links.py --save cluster.json
    python benchmarks/exchange_model.py --machine cluster.json                      # on a cluster's

Three ways for the tokens of one MoE layer to reach their experts and come back (P ranks, m a node, N = P/m nodes):

- `alltoall`, megatron-core's: a message to every rank that has one of the experts, one copy of a token for each of its
  k experts.
- `grouped`, ours: between nodes a message to the rank of the same place there, each token once for every node that has
  one of its experts; inside the node once for every rank. Results are summed on the way back.
- `domain`: `grouped` inside each of D groups of P/D ranks that hold the experts of one domain (--moe-domain-grouped,
  for random routing, which is top-1).

Time of one collective = call + max over link classes of (messages x alpha + bytes x beta): links inside a node and
between nodes work side by side, what a rank sends over one class of them goes one after the other; plus the bytes that
it packs. Routing is uniform and random, k distinct experts, so all ranks do the same: skew is not in the model, nor is
overlap with computation. Messages and bytes are those that `megatron_moe/moe/dispatch/counters.py` counts, which a test
holds the model to; empty messages are not sent.

The named machines are assumptions from published constants, NOT measurements: see the texts beside them, and put your
own cluster's numbers in.
"""

import argparse
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INSIDE, BETWEEN = "inside", "between"
LINKS = (INSIDE, BETWEEN)
SCALES = tuple(2**power for power in range(3, 13))
TOKENS = (256, 2048, 16384)
TOPK = (1, 2, 8)
WEIGHT_BYTES = 4
COUNT_BYTES = 8


# ---- machines


@dataclass(frozen=True)
class Link:
    """One class of links, as one rank sees it when all ranks send."""

    alpha: float
    """Seconds for each message."""
    beta: float
    """Seconds for each byte."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the time of an exchange depends on."""

    name: str
    ranks_per_node: int
    links: dict[str, Link]
    ranks_per_nic: int = 1
    """Ranks whose bytes go through the same network card: `beta` between nodes is that of the card."""
    call: float = 0.0
    """Seconds of every collective, whatever it sends."""
    memory: float = 0.0
    """Seconds to read or write a byte of a rank's memory, for packing."""
    in_turn: bool = False
    """Links inside and between nodes do not work side by side (ranks of a node that share a processor)."""
    basis: str = ""
    """Where the numbers come from."""


def _machine(
    name: str, basis: str, alphas_us: tuple[float, float], gbytes_s: tuple[float, float], **more: Any
) -> Machine:
    links = {
        link: Link(alpha * 1e-6, 1 / (rate * 1e9)) for link, alpha, rate in zip(LINKS, alphas_us, gbytes_s, strict=True)
    }
    return Machine(name=name, ranks_per_node=8, links=links, basis=basis, **more)


MACHINES = {
    machine.name: machine
    for machine in (
        _machine(
            "nvlink-400g",
            "assumed: 8 H100 a node on NVLink, 360 GB/s (NCCL's constant for Hopper, nvlinkBws); a 400 Gb/s card for "
            "each GPU at its line rate (DeepEP's README reports 43-47 of the 50 GB/s); latencies of NCCL's cost model "
            "(tuning.cc, ring LL: NVLink 0.6 us, network 2.7 us, call 6.6 us); memory 3.35 TB/s (data sheet)",
            (0.6, 2.7),
            (360.0, 50.0),
            call=6.6e-6,
            memory=1 / 3.35e12,
        ),
        _machine(
            "nvlink-shared-200g",
            "assumed: 8 A100 a node on NVLink, 235 GB/s (NCCL's cap for sm_80, tuning.cc), sharing one 200 Gb/s card; "
            "latencies as above; memory 2.0 TB/s (data sheet of the 80 GB card)",
            (0.6, 2.7),
            (235.0, 25.0),
            ranks_per_nic=8,
            call=6.6e-6,
            memory=1 / 2.0e12,
        ),
        _machine(
            "ethernet-100g",
            "assumed: 8 GPUs a node on PCIe 4.0 x16, 25 of its 32 GB/s, 1.0 us (NCCL's cost model, ring LL); one "
            "100 Gb/s Ethernet card a node through the kernel's TCP, 25 us a message (a round guess); memory 0.9 TB/s",
            (1.0, 25.0),
            (25.0, 12.5),
            ranks_per_nic=8,
            call=6.6e-6,
            memory=1 / 0.9e12,
        ),
    )
}


# ---- what is sent


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The tokens of one rank and what they need."""

    tokens: int
    hidden: int = 2048
    topk: int = 1
    experts: int = 64
    """Of all ranks together; spread evenly."""
    element_bytes: int = 2

    def at(self, ranks: int) -> "Shape":
        """At least one expert a rank: more experts where there are more ranks."""
        return dataclasses.replace(self, experts=max(self.experts, ranks))

    @property
    def row(self) -> int:
        """Bytes of a token."""
        return self.hidden * self.element_bytes


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one rank sends in an exchange of tokens, by link class."""

    messages: dict[str, float]
    """Other ranks to which it sends at least one token."""
    copies: dict[str, float]
    """Copies of tokens for other ranks."""
    kept: float
    """Copies that stay on the rank."""


@dataclass(frozen=True)
class Level:
    """Both ways of an exchange: a rank sends tokens there, and as many results back as it has received tokens."""

    there: Traffic
    back: Traffic


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What one rank sends in one collective."""

    name: str
    messages: dict[str, float]
    bytes: dict[str, float]
    packed: float = 0.0
    """Bytes read and written in the rank's own memory to put them in order."""
    in_turn: bool = False
    """A ring: the steps of all link classes follow one another."""
    local: bool = False
    """Nothing is sent: packing only."""

    def seconds(self, machine: Machine) -> float:
        """Time on a machine."""
        times = []
        for link in LINKS:
            alpha, beta = machine.links[link].alpha, machine.links[link].beta
            shared = machine.ranks_per_nic if link == BETWEEN else 1
            times.append(self.messages.get(link, 0.0) * alpha + self.bytes.get(link, 0.0) * beta * shared)
        sent = sum(times) if self.in_turn or machine.in_turn else max(times)
        return (0.0 if self.local else machine.call + sent) + self.packed * machine.memory


def hit_probability(experts: int, held: int, topk: int) -> float:
    """Probability that at least one of `topk` distinct experts, drawn evenly from `experts`, is among `held` of them.

    1 - C(experts - held, topk) / C(experts, topk), the hypergeometric distribution, as a product.
    """
    assert topk <= experts
    missed = 1.0
    for drawn in range(topk):
        missed *= max(0, experts - held - drawn) / (experts - drawn)
    return 1.0 - missed


def _expected(tokens: float, hit: float, copies: float, others: dict[str, int]) -> Level:
    """Every other rank gets `copies` of each of `tokens` tokens on average, and at least one with probability `hit`."""
    filled = 1.0 - (1.0 - hit) ** tokens
    traffic = Traffic(
        messages={link: count * filled for link, count in others.items()},
        copies={link: count * tokens * copies for link, count in others.items()},
        kept=tokens * copies,
    )
    return Level(traffic, traffic)


def expected_alltoall(shape: Shape, ranks: int, per_node: int) -> Level:
    """A copy for each of a token's experts."""
    assert shape.experts % ranks == 0
    hit = hit_probability(shape.experts, shape.experts // ranks, shape.topk)
    others = {INSIDE: per_node - 1, BETWEEN: ranks - per_node}
    return _expected(shape.tokens, hit, shape.topk / ranks, others)


def expected_grouped(shape: Shape, ranks: int, per_node: int) -> tuple[Level, Level]:
    """Between nodes once a node; inside the node, with the tokens of that place in all nodes, once a rank."""
    assert shape.experts % ranks == 0
    nodes = ranks // per_node
    to_node = hit_probability(shape.experts, shape.experts // nodes, shape.topk)
    to_rank = hit_probability(shape.experts, shape.experts // ranks, shape.topk)
    first = _expected(shape.tokens, to_node, to_node, {INSIDE: 0, BETWEEN: nodes - 1})
    second = _expected(shape.tokens * nodes, to_rank, to_rank, {INSIDE: per_node - 1, BETWEEN: 0})
    return first, second


def exact_alltoall(map_PTE: np.ndarray, per_node: int) -> list[Level]:
    """What every rank sends for a routing map, [ranks, tokens of a rank, experts] of bool."""
    ranks, tokens, _ = map_PTE.shape
    return _from_pairs(map_PTE.reshape(ranks, tokens, ranks, -1).sum((1, 3)), per_node)


def exact_grouped(map_PTE: np.ndarray, per_node: int) -> list[tuple[Level, Level]]:
    """The same of `grouped`, both levels."""
    ranks, tokens, _ = map_PTE.shape
    nodes = ranks // per_node
    to_rank_PTP = map_PTE.reshape(ranks, tokens, ranks, -1).any(3)
    to_node_PN = to_rank_PTP.reshape(ranks, tokens, nodes, per_node).any(3).sum(1)
    first, second = np.zeros((2, ranks, ranks), dtype=np.int64)
    for source, target in itertools.product(range(ranks), range(nodes)):
        # The rank of the same place hands the tokens on to those of its node that need them.
        relay = target * per_node + source % per_node
        first[source, relay] += to_node_PN[source, target]
        here = slice(target * per_node, (target + 1) * per_node)
        second[relay, here] += to_rank_PTP[source, :, here].sum(0)
    return list(zip(_from_pairs(first, per_node), _from_pairs(second, per_node), strict=True))


def _from_pairs(copies_PP: np.ndarray, per_node: int) -> list[Level]:
    back_PP = copies_PP.T
    return [Level(*(_of_rank(pairs, rank, per_node) for pairs in (copies_PP, back_PP))) for rank in range(len(back_PP))]


def _of_rank(copies_PP: np.ndarray, rank: int, per_node: int) -> Traffic:
    node = np.arange(len(copies_PP)) // per_node
    classes = {INSIDE: node == node[rank], BETWEEN: node != node[rank]}
    classes[INSIDE][rank] = False
    return Traffic(
        messages={link: int((copies_PP[rank, which] > 0).sum()) for link, which in classes.items()},
        copies={link: int(copies_PP[rank, which].sum()) for link, which in classes.items()},
        kept=int(copies_PP[rank, rank]),
    )


# ---- collectives of a dispatcher, and their time


def _send(name: str, traffic: Traffic, row: float, packed_rows: float = 0.0) -> Collective:
    return Collective(
        name=name,
        messages=traffic.messages,
        bytes={link: copies * row for link, copies in traffic.copies.items()},
        # Every row is read once and written once.
        packed=2 * packed_rows * row,
    )


def alltoall(shape: Shape, ranks: int, per_node: int, level: Level | None = None) -> list[Collective]:
    """Dispatch and combine of megatron-core's alltoall dispatcher, as one rank sees them.

    Args:
        shape: what a rank has.
        ranks: P.
        per_node: m.
        level: one of `exact_alltoall`; default: what is expected.
    """
    level = level or expected_alltoall(shape, ranks, per_node)
    nodes = ranks // per_node
    # All ranks learn how many tokens each sends to each expert: an all-gather, in rings of which each leaves a node by
    # another rank.
    passed = (ranks - 1) * shape.experts * COUNT_BYTES
    leaving = 1 / per_node if nodes > 1 else 0.0
    counts = Collective(
        name="counts",
        messages={INSIDE: ranks - nodes, BETWEEN: nodes - 1},
        bytes={INSIDE: passed * (1 - leaving), BETWEEN: passed * leaving},
        in_turn=True,
    )
    # Sorted by expert before and, where a rank has more than one, after the exchange; and back again.
    rows = shape.tokens * shape.topk * (2 if shape.experts > ranks else 1)
    return [
        counts,
        _send("dispatch", level.there, shape.row, rows),
        _send("dispatch weights", level.there, WEIGHT_BYTES),
        _send("combine", level.back, shape.row, rows),
    ]


def grouped(shape: Shape, ranks: int, per_node: int, levels: tuple[Level, Level] | None = None) -> list[Collective]:
    """The same of `megatron_moe/moe/dispatch/grouped.py`. A level that has one destination is left out.

    Args:
        shape: what a rank has.
        ranks: P.
        per_node: m.
        levels: a rank's of `exact_grouped`; default: what is expected.
    """
    nodes = ranks // per_node
    first, second = levels or expected_grouped(shape, ranks, per_node)
    used = [part for part in ((BETWEEN, first, nodes), (INSIDE, second, per_node)) if part[2] > 1]
    dispatch: list[Collective] = []
    combine: list[Collective] = []
    counts: list[Collective] = []
    reached = 1
    for link, level, size in used:
        reached *= size
        # For each destination the rows for it and, of each rank behind it, the rows and the assignments.
        behind = ranks // reached
        numbers = 2 if behind == 1 else 1 + 2 * behind
        sent = (size - 1) * numbers * COUNT_BYTES
        counts.append(Collective(name=f"counts {link}", messages={link: size - 1}, bytes={link: sent}))
        copied = sum(level.there.copies.values()) + level.there.kept
        # A row travels with its weights for all experts behind the destination.
        weights = shape.experts // reached * WEIGHT_BYTES
        dispatch.append(_send(f"dispatch {link}", level.there, shape.row + weights, copied))
        combine.insert(0, _send(f"combine {link}", level.back, shape.row, copied))
    # Rows are copied for the experts of their rank, and the outputs of these are summed.
    packed = 4.0 * shape.tokens * shape.topk * shape.row
    experts = Collective(name="experts", messages={}, bytes={}, packed=packed, local=True)
    return [*counts, *dispatch, experts, *combine]


def domain(shape: Shape, ranks: int, per_node: int, domains: int) -> list[Collective]:
    """`grouped` inside one of `domains` groups of neighbouring ranks."""
    group = ranks // domains
    of_group = dataclasses.replace(shape, experts=shape.experts // domains)
    return grouped(of_group, group, min(per_node, group))


def seconds(collectives: list[Collective], machine: Machine) -> float:
    """One after the other: each needs what the one before has brought."""
    return sum(collective.seconds(machine) for collective in collectives)


def compare(shape: Shape, machine: Machine, scales: Sequence[int], domains: int) -> dict[str, list[float]]:
    """Seconds of dispatch and combine of each way, for every number of ranks; NaN where domains cannot be had."""
    m = machine.ranks_per_node
    times: dict[str, list[float]] = {"alltoall": [], "grouped": [], "domain": []}
    for ranks in scales:
        here = shape.at(ranks)
        times["alltoall"].append(seconds(alltoall(here, ranks, m), machine))
        times["grouped"].append(seconds(grouped(here, ranks, m), machine))
        possible = shape.topk == 1 and ranks % domains == 0
        times["domain"].append(seconds(domain(here, ranks, m, domains), machine) if possible else math.nan)
    return times


def wins_from(ratios: Sequence[float], scales: Sequence[int]) -> int | None:
    """The smallest scale from which on every ratio is above 1; None if the largest scale is still lost."""
    won = list(itertools.takewhile(lambda pair: pair[1] > 1.0, reversed(list(zip(scales, ratios, strict=True)))))
    return won[-1][0] if won else None


# ---- what is printed and drawn


def slower(machine: Machine, factor: float) -> Machine:
    """The same with another time for a message between nodes, the least certain of its constants."""
    between = machine.links[BETWEEN]
    return dataclasses.replace(machine, links=machine.links | {BETWEEN: Link(between.alpha * factor, between.beta)})


def table(machine: Machine, shapes: Sequence[Shape], scales: Sequence[int], domains: int) -> Iterator[str]:
    """Markdown: from where the hierarchical exchange wins, by how much, and what that owes to alpha."""
    some = [ranks for ranks in (8, 64, 512, 4096) if ranks in scales]
    yield (
        f"| tokens a rank | top-k | grouped wins from | with alpha / 4 | alpha x 4 | "
        f"{' | '.join(f'at {ranks}' for ranks in some)} | alltoall, ms, at {scales[-1]} | grouped, ms "
        f"| in {domains} domains, ms |"
    )
    yield "|---" * (len(some) + 8) + "|"
    for shape in shapes:
        cells = [f"{shape.tokens:,}", str(shape.topk)]
        ratios: dict[float, list[float]] = {}
        for factor in (1.0, 0.25, 4.0):
            times = compare(shape, slower(machine, factor), scales, domains)
            ratios[factor] = [flat / ours for flat, ours in zip(times["alltoall"], times["grouped"], strict=True)]
            start = wins_from(ratios[factor], scales)
            cells.append("not" if start is None else f"{start:,}")
        cells += [f"{ratios[1.0][scales.index(ranks)]:.2f}x" for ranks in some]
        times = compare(shape, machine, scales[-1:], domains)
        cells += ["" if math.isnan(values[0]) else f"{values[0] * 1e3:,.2f}" for values in times.values()]
        yield f"| {' | '.join(cells)} |"


def traffic_table(shapes: Sequence[Shape], ranks: int, per_node: int) -> Iterator[str]:
    """Markdown: messages and bytes of one rank, dispatch and combine, without the counts."""
    yield "| top-k | way | messages inside | between nodes | MB inside | between nodes | KB of one with tokens |"
    yield "|---|---|---|---|---|---|---|"
    ways: dict[str, Callable[[Shape, int, int], list[Collective]]] = {"alltoall": alltoall, "grouped": grouped}
    for shape, (name, way) in itertools.product(shapes, ways.items()):
        parts = [part for part in way(shape.at(ranks), ranks, per_node) if not part.name.startswith("counts")]
        messages = {link: sum(part.messages.get(link, 0.0) for part in parts) for link in LINKS}
        megabytes = {link: sum(part.bytes.get(link, 0.0) for part in parts) / 1e6 for link in LINKS}
        tokens = next(part for part in parts if part.messages.get(BETWEEN))
        kilobytes = tokens.bytes[BETWEEN] / tokens.messages[BETWEEN] / 1e3
        yield (
            f"| {shape.topk} | {name} | {messages[INSIDE]:,.0f} | {messages[BETWEEN]:,.0f} "
            f"| {megabytes[INSIDE]:,.1f} | {megabytes[BETWEEN]:,.1f} | {kilobytes:,.0f} |"
        )


_COLOURS = ("#08519c", "#d94801", "#238b45", "#756bb1")


def draw_ratios(machines: Sequence[Machine], shape: Shape, scales: Sequence[int], domains: int) -> "Figure":
    """How many times faster `grouped` is than `alltoall`, by machine, top-k and tokens of a rank."""

    def panel(axes: Any, machine: Machine, topk: int) -> None:
        for tokens, colour in zip(TOKENS, _COLOURS, strict=False):
            times = compare(dataclasses.replace(shape, tokens=tokens, topk=topk), machine, scales, domains)
            ratios = np.array(times["alltoall"]) / np.array(times["grouped"])
            axes.plot(scales, ratios, "o-", color=colour, markersize=4, label=f"{tokens:,} tokens a rank")
        axes.axhline(1.0, color="#636363", linewidth=1)
        axes.axhspan(0.1, 1.0, color="#636363", alpha=0.1, linewidth=0)

    title = "alltoall's time over grouped's: above the line the hierarchical exchange wins"
    return _grid(machines, panel, title, scales, "times as fast", (0.7, 8.0), shape)


def draw_seconds(machines: Sequence[Machine], shape: Shape, scales: Sequence[int], domains: int) -> "Figure":
    """Milliseconds of dispatch and combine of the three ways."""

    def panel(axes: Any, machine: Machine, topk: int) -> None:
        times = compare(dataclasses.replace(shape, topk=topk), machine, scales, domains)
        labels = {"alltoall": "alltoall", "grouped": "grouped", "domain": f"grouped in {domains} domains"}
        for (name, values), colour in zip(times.items(), _COLOURS, strict=False):
            axes.plot(scales, np.array(values) * 1e3, "o-", color=colour, markersize=4, label=labels[name])

    title = f"Dispatch and combine of one MoE layer, {shape.tokens:,} tokens a rank"
    return _grid(machines, panel, title, scales, "milliseconds", None, shape)


def _grid(
    machines: Sequence[Machine],
    panel: Any,
    title: str,
    scales: Sequence[int],
    ylabel: str,
    limits: tuple[float, float] | None,
    shape: Shape,
) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 2.6 * len(machines) + 1.2), layout="constrained", dpi=100)
    figure.suptitle(f"{title}\nmodel with assumed constants, hidden {shape.hidden}, bf16", fontsize=12)
    grid = figure.subplots(len(machines), len(TOPK), sharex=True, sharey="row" if limits is None else "all")
    grid = np.atleast_2d(grid)
    for (row, machine), (column, topk) in itertools.product(enumerate(machines), enumerate(TOPK)):
        axes = grid[row, column]
        panel(axes, machine, topk)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        if limits is not None:
            axes.set_ylim(*limits)
            axes.set_yticks([1, 2, 4, 8])
            axes.set_yticks([], minor=True)
        axes.set_title(f"{machine.name}, top-{topk}", fontsize=10)
        axes.set_xticks(scales[::3], [f"{ranks:,}" for ranks in scales[::3]])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if row == len(machines) - 1:
            axes.set_xlabel("ranks")
        if column == 0:
            axes.set_ylabel(ylabel)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(TOKENS), frameon=False)
    return figure


# ---- command line


def describe(machine: Machine) -> str:
    """One line of the constants."""
    links = [
        f"{name}: {link.alpha * 1e6:.2f} us a message, {1e-9 / link.beta if link.beta else math.inf:.2f} GB/s"
        for name, link in machine.links.items()
    ]
    shared = f", shared by {machine.ranks_per_nic} ranks" if machine.ranks_per_nic > 1 else ""
    return (
        f"{machine.name}: {machine.ranks_per_node} ranks a node; {'; '.join(links)}{shared}; "
        f"{machine.call * 1e6:.1f} us a collective"
    )


def read_machine(text: str) -> Machine:
    """A machine by its name, or from a file that `exchange_links.py --save` wrote."""
    if text in MACHINES:
        return MACHINES[text]
    try:
        values = json.loads(Path(text).read_text(encoding="utf-8"))
        links = {name: Link(**values.pop(name)) for name in LINKS}
        return Machine(name=Path(text).stem, links=links, **values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise argparse.ArgumentTypeError(
            f"{text}: neither one of {', '.join(MACHINES)} nor a file of exchange_links.py --save "
            f"({type(error).__name__}: {error})"
        ) from error


def measured_here(ranks: int, per_node: int | None, device: str) -> Machine:
    """This machine's links, by `exchange_links.py` in ranks of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "measured.json"
        command = [sys.executable, str(Path(__file__).with_name("exchange_links.py")), "--save", str(file)]
        command += ["--ranks", str(ranks), "--device", device]
        done = subprocess.run([*command, *(["--ranks-per-node", str(per_node)] if per_node else [])], check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        return read_machine(str(file))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", nargs="+", type=read_machine, default=list(MACHINES.values()), metavar="NAME")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=64, help="at least; one a rank where there are more ranks")
    parser.add_argument("--domains", type=int, default=4, help="groups of the domain-grouped exchange")
    parser.add_argument("--ranks-per-nic", type=int, help="ranks of a node that share a network card")
    parser.add_argument("--alpha-scale", type=float, default=1.0, help="multiplies the time of a message between nodes")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write the pictures there")
    parser.add_argument("--measure", action="store_true", help="this machine's own links, with exchange_links.py")
    parser.add_argument("--ranks", type=int, default=4, help="ranks that --measure starts")
    parser.add_argument("--ranks-per-node", type=int, help="nodes that --measure imitates")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of --measure")
    return parser.parse_args(argv)


def _adjusted(machine: Machine, flags: argparse.Namespace) -> Machine:
    adjusted = slower(machine, flags.alpha_scale)
    return dataclasses.replace(adjusted, ranks_per_nic=flags.ranks_per_nic or machine.ranks_per_nic)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables and draw the pictures."""
    flags = _parse(argv)
    given = [measured_here(flags.ranks, flags.ranks_per_node, flags.device)] if flags.measure else flags.machine
    machines = [_adjusted(machine, flags) for machine in given]
    shape = Shape(tokens=TOKENS[1], hidden=flags.hidden, experts=flags.experts)
    shapes = [dataclasses.replace(shape, tokens=tokens, topk=topk) for tokens in TOKENS for topk in TOPK]
    for machine in machines:
        scales = [ranks for ranks in SCALES if ranks % machine.ranks_per_node == 0]
        print(f"\n{describe(machine)}\n{machine.basis}\n")
        print("\n".join(table(machine, shapes, scales, flags.domains)))
    print(f"\nOne rank's share, {shape.tokens:,} tokens, hidden {shape.hidden}, bf16, 512 ranks, 8 a node\n")
    print("\n".join(traffic_table([dataclasses.replace(shape, topk=topk) for topk in TOPK], 512, 8)))
    if flags.plot:
        flags.plot.mkdir(parents=True, exist_ok=True)
        for name, draw in (("exchange_ratio", draw_ratios), ("exchange_seconds", draw_seconds)):
            draw(machines, shape, SCALES, flags.domains).savefig(flags.plot / f"{name}.png")


if __name__ == "__main__":
    main()
