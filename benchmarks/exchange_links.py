"""What a message and a byte cost between real ranks, inside a node and between nodes: alpha and beta, fitted.

    python benchmarks/exchange_links.py                                            # 4 ranks on this machine
    python benchmarks/exchange_links.py --ranks 8 --ranks-per-node 4               # as if it were two nodes
    torchrun --nnodes 4 --nproc-per-node 8 ... benchmarks/exchange_links.py --save cluster.json

Times all_to_all_single of several sizes in groups of ranks of one node, of ranks of the same place in all nodes, and of
all ranks: NCCL where every rank has a GPU, else gloo. Every second size is fitted to, the others say how far the fit
can be trusted. `benchmarks/exchange_model.py --machine cluster.json` reads what --save writes.

All ranks send at the same time, so that what they share (a network card, the cores of a processor) is in the numbers.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

INSIDE, BETWEEN = "inside", "between"
LINKS = (INSIDE, BETWEEN)
UNCOUNTED = 3


@dataclass(frozen=True)
class Timing:
    """One exchange of equal parts."""

    messages: tuple[int, int]
    """That a rank sends, inside its node and to others."""
    part: int
    """Bytes of each."""
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Seconds of a collective: call + messages x alpha + bytes x beta, of both links or of the slower one."""

    call: float
    alpha: tuple[float, float]
    beta: tuple[float, float]
    in_turn: bool

    def seconds(self, timing: Timing) -> float:
        """What the fit says."""
        times = self.of_links(timing)
        return self.call + (sum(times) if self.in_turn else max(times))

    def of_links(self, timing: Timing) -> list[float]:
        """Without the call, by link."""
        return [
            count * (alpha + timing.part * beta)
            for count, alpha, beta in zip(timing.messages, self.alpha, self.beta, strict=True)
        ]

    def error(self, timings: Sequence[Timing]) -> float:
        """Root of the mean squared relative error."""
        return float(np.sqrt(np.mean([(self.seconds(timing) / timing.seconds - 1) ** 2 for timing in timings])))


def fit(timings: Sequence[Timing]) -> Fit:
    """Call, alpha and beta of both links, none of them negative; links side by side or in turn, whichever fits better.

    Least squares of relative errors, so that small messages count as much as large ones.
    """
    in_turn = _solve(timings, [(True, True)] * len(timings), in_turn=True)
    beside = in_turn
    for _ in range(4):
        # Which of the two links is the slower one depends on the solution.
        times = [beside.of_links(timing) for timing in timings]
        beside = _solve(timings, [(inside >= between, between > inside) for inside, between in times], in_turn=False)
    return min(in_turn, beside, key=lambda solution: solution.error(timings))


def _solve(timings: Sequence[Timing], counted: Sequence[tuple[bool, bool]], in_turn: bool) -> Fit:
    rows = np.array(
        [
            [1.0, *(n * used for n, used in pairs), *(n * timing.part * used for n, used in pairs)]
            for timing, use in zip(timings, counted, strict=True)
            for pairs in [list(zip(timing.messages, use, strict=True))]
        ]
    )
    rows /= np.array([[timing.seconds] for timing in timings])
    scale = np.maximum(rows.max(0), np.finfo(float).tiny)
    best, least = np.zeros(5), np.inf
    # With five unknowns every choice of those that are 0 can be tried.
    for used in itertools.product((False, True), repeat=5):
        columns = np.flatnonzero(used)
        solution = np.zeros(5)
        solution[columns] = np.linalg.lstsq(rows[:, columns] / scale[columns], np.ones(len(rows)), rcond=None)[0]
        error = float(((rows / scale @ solution - 1) ** 2).sum())
        if solution.min() >= 0.0 and error < least:
            best, least = solution, error
    call, alpha_inside, alpha_between, beta_inside, beta_between = (best / scale).tolist()
    return Fit(call, (alpha_inside, alpha_between), (beta_inside, beta_between), in_turn)


def measure(per_node: int, device: Any, sizes: Sequence[int], repeats: int) -> list[Timing]:
    """Exchanges in groups of every size, in ranks that have joined torch.distributed; all call it together."""
    import torch.distributed as dist

    rank, ranks = dist.get_rank(), dist.get_world_size()
    nodes = ranks // per_node
    inside = [list(range(first, first + per_node)) for first in range(0, ranks, per_node)]
    between = [list(range(place, ranks, per_node)) for place in range(per_node)]
    timings = []
    for link, neighbours in enumerate((inside, between)):
        for size in (2**power for power in range(1, 13) if 2**power <= len(neighbours[0])):
            blocks = [block[at : at + size] for block in neighbours for at in range(0, len(block) - size + 1, size)]
            # Made by all ranks together, those that are not in it included.
            groups = [dist.new_group(block) for block in blocks]
            mine = next((group for group, block in zip(groups, blocks, strict=True) if rank in block), None)
            messages = (size - 1, 0) if link == 0 else (0, size - 1)
            timings += [Timing(messages, part, time_exchange(mine, size, part, device, repeats)) for part in sizes]
    if nodes > 1 and per_node > 1:
        messages = (per_node - 1, ranks - per_node)
        timings += [
            Timing(messages, part, time_exchange(dist.group.WORLD, ranks, part, device, repeats)) for part in sizes
        ]
    return timings


def time_exchange(group: Any, size: int, part: int, device: Any, repeats: int) -> float:
    """Seconds of all_to_all_single of `part` bytes to each rank: the median of a rank's, the most over all ranks."""
    import torch
    import torch.distributed as dist

    taken = []
    if group is not None:
        sent = torch.ones(size * part, dtype=torch.uint8, device=device)
        received = torch.empty_like(sent)
        for _ in range(repeats + UNCOUNTED):
            dist.barrier(group)
            _wait(device)
            began = time.perf_counter()
            dist.all_to_all_single(received, sent, group=group)
            _wait(device)
            taken.append(time.perf_counter() - began)
    middle = statistics.median(taken[UNCOUNTED:]) if taken else 0.0
    most = torch.tensor([middle], dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def memory_seconds_per_byte(device: Any) -> float:
    """Of a copy, which reads and writes each byte."""
    import torch

    source = torch.ones(1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = []
    for _ in range(6):
        _wait(device)
        began = time.perf_counter()
        target.copy_(source)
        _wait(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:]) / (2 * source.numel())


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def run_rank(flags: argparse.Namespace) -> None:
    """Measure and fit; rank 0 prints."""
    import torch
    import torch.distributed as dist

    local = int(os.environ["LOCAL_WORLD_SIZE"])
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= local
    cuda = flags.device == "cuda" or (flags.device == "auto" and enough)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    per_node = flags.ranks_per_node or local
    if int(os.environ["WORLD_SIZE"]) % per_node:
        raise SystemExit(f"error: --ranks-per-node {per_node}: must divide {os.environ['WORLD_SIZE']} ranks")
    dist.init_process_group("nccl" if cuda else "gloo")
    timings = measure(per_node, device, flags.sizes, flags.repeats)
    memory = memory_seconds_per_byte(device)
    if dist.get_rank() == 0:
        backend = f"{dist.get_world_size()} ranks of {dist.get_backend()}, {per_node} a node"
        where = torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores"
        basis = f"measured: {backend}, {where}, torch {torch.__version__}, {time.strftime('%d %B %Y')}"
        print(f"{basis}\n{report(timings, flags.sizes)}", flush=True)
        if not cuda and local > (os.cpu_count() or 1):
            print(f"{local} ranks share {os.cpu_count()} cores: they wait for one another, which no fit knows")
        if flags.save:
            values = {"ranks_per_node": per_node, "memory": memory, "basis": basis}
            flags.save.write_text(json.dumps(machine(fit_to(timings, flags.sizes), timings) | values, indent=1) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def fit_to(timings: Sequence[Timing], sizes: Sequence[int]) -> Fit:
    """A fit to every second size."""
    return fit([timing for timing in timings if timing.part in sizes[::2]])


def report(timings: Sequence[Timing], sizes: Sequence[int]) -> str:
    """What was measured, and what the fit says of it."""
    fitted = fit_to(timings, sizes)
    lines = ["messages inside, between | bytes of each | measured, us | fit, us | error"]
    for timing in timings:
        told = fitted.seconds(timing)
        mark = "" if timing.part in sizes[::2] else "  not fitted to"
        lines.append(
            f"{timing.messages[0]:>15}, {timing.messages[1]:<7} | {timing.part:>13,} | {timing.seconds * 1e6:>12,.1f} "
            f"| {told * 1e6:>7,.1f} | {told / timing.seconds - 1:+.0%}{mark}"
        )
    others = [timing for timing in timings if timing.part not in sizes[::2]]
    order = "one after the other" if fitted.in_turn else "side by side"
    lines.append(f"root mean square error of the sizes that were not fitted to: {fitted.error(others or timings):.0%}")
    lines.append(f"a collective {fitted.call * 1e6:.1f} us; links inside and between nodes work {order}")
    for place, link in enumerate(LINKS):
        if any(timing.messages[place] for timing in timings):
            rate = f"{1e-9 / fitted.beta[place]:.2f} GB/s" if fitted.beta[place] else "bytes cost nothing measurable"
            lines.append(f"{link}: {fitted.alpha[place] * 1e6:.2f} us a message, {rate}")
    return "\n".join(lines)


def machine(fitted: Fit, timings: Sequence[Timing]) -> dict[str, Any]:
    """The fields of `exchange_model.py:Machine`. A link that no rank here has is given the other one's numbers."""
    seen = [any(timing.messages[place] for timing in timings) for place in range(2)]
    use = [place if seen[place] else 1 - place for place in range(2)]
    links = {
        link: {"alpha": fitted.alpha[place], "beta": fitted.beta[place]} for link, place in zip(LINKS, use, strict=True)
    }
    return {**links, "call": fitted.call, "in_turn": fitted.in_turn}


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start here, if torchrun has not")
    parser.add_argument("--ranks-per-node", type=int, help="imitate smaller nodes; default: as torchrun says")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**power for power in range(8, 23)], metavar="BYTES")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--save", type=Path, metavar="FILE", help="what exchange_model.py --machine reads")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Be a rank, or start some."""
    flags = _parse(argv)
    if "RANK" in os.environ:
        return run_rank(flags)
    words = sys.argv[1:] if argv is None else list(argv)
    launch = [sys.executable, "-m", "megatron_moe.torchrun", "--nproc-per-node", str(flags.ranks), __file__]
    raise SystemExit(subprocess.run([*launch, *words], check=False).returncode)


if __name__ == "__main__":
    main()
