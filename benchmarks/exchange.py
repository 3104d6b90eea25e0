"""What expert parallelism costs on real ranks: the share of a training step that goes into exchanging tokens.

    python benchmarks/exchange.py                                  # 4 gloo ranks on this machine, EP=4
    python benchmarks/exchange.py --dispatchers alltoall grouped-2 --topk 2 --steps 20
    torchrun --nnodes 2 --nproc-per-node 8 ... benchmarks/exchange.py     # on a cluster: all ranks are one EP group

Every variant is a dispatcher with a top-k: `grouped-2` is `--moe-token-dispatcher-type grouped --ranks-per-node 2`. All
are built in the same ranks, with the same weights and tokens, and take turns step by step, so that whatever else the
machine does falls on all of them. One thread a rank.

`in exchange` is the time of every collective of the dispatchers, forward and backward. A rank that comes early waits
there for the others; `all there` is the time from when the last rank of a collective has come to when the last one
leaves (on one machine only, whose ranks have one clock). `bare` is the time of the same collectives, of the same sizes
and in the same order, with nothing between them: what the backend needs to move the bytes. Bytes are those for other
ranks; of an all-gather those of its part for each of the others, of a reduce-scatter the parts of the others.
"""

import argparse
import inspect
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.config.base import UserError
from megatron_moe.config.run import RunConfig
from megatron_moe.config.yaml_io import build_run
from megatron_moe.runtime.launch import run_entry_point
from megatron_moe.runtime.quiet import silence_third_party_warnings

UNCOUNTED = 2
DISPATCHERS = ("allgather", "alltoall", "grouped-2", "grouped-4")


@dataclass
class Call:
    """One collective of a dispatcher on this rank."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    """As it was called, with sizes in place of tensors."""
    bytes_inside: int
    bytes_between: int
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """With waiting for other ranks."""
        return self.ended - self.began

    def tensors(self) -> dict[str, Any]:
        """New ones of the same sizes."""
        import torch

        return {
            name: torch.zeros(shape, dtype=dtype, device=device)
            for name, (shape, dtype, device) in self.arguments["tensors"].items()
        }


@dataclass
class Recorder:
    """The collectives of dispatchers in a step: all of these three kinds, as nothing else here uses them."""

    per_node: int
    calls: list[Call] = field(default_factory=list)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Put a clock around `all_to_all_single` and around what gathers and scatters sequences.

        `tensor_parallel/mappings.py` holds `dist_all_gather_func` and `dist_reduce_scatter_func`, which dispatchers
        reach through `gather_from_sequence_parallel_region` and `reduce_scatter_to_sequence_parallel_region`. Gradients
        are reduced with `all_reduce` (no --use-distributed-optimizer), and there is no tensor parallelism.
        """
        import torch.distributed as dist
        from megatron.core.tensor_parallel import mappings

        places = [(dist, "all_to_all_single"), (mappings, "dist_all_gather_func")]
        places.append((mappings, "dist_reduce_scatter_func"))
        before = [(owner, name, getattr(owner, name)) for owner, name in places]
        try:
            for owner, name, function in before:
                setattr(owner, name, self._timed(name, function))
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            import torch

            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            _wait()
            began = time.perf_counter()
            result = function(*args, **kwargs)
            _wait()
            ended = time.perf_counter()
            arguments: dict[str, Any] = {"tensors": {}, "others": {}}
            for key, value in given.arguments.items():
                if isinstance(value, torch.Tensor):
                    arguments["tensors"][key] = (tuple(value.shape), value.dtype, value.device)
                else:
                    arguments["others"][key] = value
            self.calls.append(Call(function, arguments, *self._bytes(name, given.arguments), began, ended))
            return result

        return call

    def _bytes(self, name: str, arguments: dict[str, Any]) -> tuple[int, int]:
        """For other ranks of the node and for other nodes."""
        import torch.distributed as dist

        ranks, me = dist.get_process_group_ranks(arguments["group"]), dist.get_rank()
        sent = arguments["input_tensor" if "input_tensor" in arguments else "input"]
        whole = sent.numel() * sent.element_size()
        if name == "dist_all_gather_func":
            parts = [whole] * len(ranks)
        elif arguments.get("input_split_sizes") is not None:
            parts = [int(rows) * (whole // len(sent) if len(sent) else 0) for rows in arguments["input_split_sizes"]]
        else:
            parts = [whole // len(ranks)] * len(ranks)
        inside = between = 0
        for rank, part in zip(ranks, parts, strict=True):
            if rank != me and rank // self.per_node == me // self.per_node:
                inside += part
            elif rank != me:
                between += part
        return inside, between


@dataclass
class Variant:
    """A model with one dispatcher, stepped on random tokens, and what was measured of it."""

    dispatcher: str
    topk: int
    run: RunConfig
    model: Any
    optimizer: Any
    batch: dict[str, Any]
    recorder: Recorder
    steps: list[float] = field(default_factory=list)
    exchanges: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    bares: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One training step, begun by all ranks together; then its collectives alone."""
        import torch.distributed as dist

        from megatron_moe.training.step import train_step

        self.recorder.calls.clear()
        dist.barrier()
        began = time.perf_counter()
        with self.recorder.recording():
            result = train_step(self.run, self.model, self.optimizer, [iter([self.batch])], 1)
        _wait()
        self.steps.append(_most(time.perf_counter() - began))
        self.exchanges.append(_mean(sum(call.seconds for call in self.recorder.calls)))
        self.together.append(_all_there(self.recorder.calls))
        self.losses.append(result.loss)
        tensors = [call.tensors() for call in self.recorder.calls]
        dist.barrier()
        began = time.perf_counter()
        for call, values in zip(self.recorder.calls, tensors, strict=True):
            call.function(**values, **call.arguments["others"])
        _wait()
        self.bares.append(_mean(time.perf_counter() - began))


def build_variant(name: str, topk: int, flags: argparse.Namespace) -> Variant:
    """This rank's part of a variant; all ranks build it together."""
    import torch
    import torch.distributed as dist

    from megatron_moe.config.validate import validate
    from megatron_moe.model.gpt import build_model
    from megatron_moe.runtime.seeds import set_seeds
    from megatron_moe.training.optimizer import build_optimizer, wrap_data_parallel

    run = variant_run(name, topk, flags, dist.get_world_size())
    validate(run, dist.get_world_size())
    set_seeds(run.training.seed)
    model = wrap_data_parallel(run, build_model(run))
    torch.manual_seed(dist.get_rank())
    recorder = Recorder(flags.ranks_per_node)
    return Variant(name, topk, run, model, build_optimizer(run, model), random_batch(run), recorder)


def variant_run(name: str, topk: int, flags: argparse.Namespace, ranks: int) -> RunConfig:
    """The run of a line of the table."""
    dispatcher, _, per_node = name.partition("-")
    if dispatcher not in ("allgather", "alltoall", "grouped") or not (per_node.isdecimal() or not per_node):
        raise UserError(f"--dispatchers {name}: must be allgather, alltoall, grouped or grouped-N for nodes of N ranks")
    return build_run(
        {
            "model": {
                "num_layers": flags.layers,
                "hidden_size": flags.hidden,
                "ffn_hidden_size": flags.ffn,
                "num_attention_heads": max(1, flags.hidden // 64),
                "seq_length": flags.seq_length,
                "vocab_size": flags.vocab,
                "attention_dropout": 0.0,
                "hidden_dropout": 0.0,
            },
            "moe": {
                "num_experts": (flags.experts,),
                "moe_router_topk": topk,
                "moe_token_dispatcher_type": dispatcher,
            },
            "parallel": {
                "device": flags.device,
                "expert_model_parallel_size": ranks,
                "ranks_per_node": int(per_node) if per_node else None,
            },
            "training": {
                "micro_batch_size": flags.batch,
                "global_batch_size": flags.batch * ranks,
                "train_iters": 1,
                "eval_interval": 0,
                "bf16": flags.bf16,
            },
        }
    )


def random_batch(run: RunConfig) -> dict[str, Any]:
    """This rank's micro-batch of random tokens, [B, S] each."""
    import torch

    shape = (run.training.micro_batch_size, run.model.seq_length)
    tokens = torch.randint(0, run.model.padded_vocab_size, shape)
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "loss_mask": torch.ones(shape),
        "position_ids": torch.arange(shape[1]).expand(shape).contiguous(),
        "samples": torch.arange(shape[0]),
    }


def _wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _over_ranks(value: float, operation: Any) -> float:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor([value], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(tensor, op=operation)
    return float(tensor)


def _most(value: float) -> float:
    import torch.distributed as dist

    return _over_ranks(value, dist.ReduceOp.MAX)


def _mean(value: float) -> float:
    import torch.distributed as dist

    return _over_ranks(value, dist.ReduceOp.SUM) / dist.get_world_size()


def _all_there(calls: Sequence[Call]) -> float:
    """Seconds of collectives after the last rank has come to them; mean over ranks. NaN with several clocks."""
    import torch
    import torch.distributed as dist

    if os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        return math.nan
    device = torch.cuda.current_device()
    mine = torch.tensor([[call.began, call.ended] for call in calls], dtype=torch.float64, device=device)
    clocks = torch.empty((dist.get_world_size(), *mine.shape), dtype=torch.float64, device=device)
    dist.all_gather_into_tensor(clocks.view(-1, 2), mine)
    seconds = 0.0
    for place, call in enumerate(calls):
        ranks = dist.get_process_group_ranks(call.arguments["others"]["group"])
        latest_RT = clocks[ranks, place].max(0).values
        seconds += float(latest_RT[1] - latest_RT[0])
    return _mean(seconds)


def table(variants: Sequence[Variant]) -> list[str]:
    """Markdown; all ranks call it together."""
    columns = ["dispatcher", "top-k", "step, ms", "in exchange, ms", "share", "all there, ms", "share", "bare, ms"]
    columns += ["collectives", "MB for others", "of which to other nodes", "MB/s all there", "bare", "step, alltoall's"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    medians = {(variant.dispatcher, variant.topk): statistics.median(variant.steps[UNCOUNTED:]) for variant in variants}
    for variant in variants:
        step = medians[variant.dispatcher, variant.topk]
        exchange, there, bare = (
            statistics.median(values[UNCOUNTED:]) for values in (variant.exchanges, variant.together, variant.bares)
        )
        calls = variant.recorder.calls
        between = _mean(sum(call.bytes_between for call in calls)) / 1e6
        megabytes = _mean(sum(call.bytes_inside for call in calls)) / 1e6 + between
        stock = medians.get(("alltoall", variant.topk))
        cells = [variant.dispatcher, str(variant.topk), f"{step * 1e3:.1f}"]
        cells += [f"{exchange * 1e3:.1f}", f"{exchange / step:.0%}", f"{there * 1e3:.1f}", f"{there / step:.0%}"]
        cells += [f"{bare * 1e3:.1f}", str(len(calls)), f"{megabytes:.4g}", f"{between:.4g}"]
        cells += [f"{megabytes / there:,.0f}", f"{megabytes / bare:,.0f}", f"{stock / step:.2f}x" if stock else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run_rank(flags: argparse.Namespace) -> list[str]:
    """Build all variants, step them in turns; the lines to print."""
    silence_third_party_warnings()
    import torch
    import torch.distributed as dist

    from megatron_moe.config.parallel import ParallelConfig
    from megatron_moe.runtime.distributed import environment_world_size, start

    torch.set_num_threads(1)
    ranks = environment_world_size()
    start(ParallelConfig(device=flags.device, expert_model_parallel_size=ranks))
    variants = [build_variant(name, topk, flags) for topk in flags.topk for name in flags.dispatchers]
    for _ in range(UNCOUNTED + flags.steps):
        for variant in variants:
            variant.step()
    tokens = flags.batch * flags.seq_length
    lines = [
        f"{ranks} ranks of {dist.get_backend()}, one thread each, {os.cpu_count()} cores here | {flags.layers} layers, "
        f"hidden {flags.hidden}, {flags.experts} experts of {flags.ffn}, {tokens} tokens a rank, "
        f"{'bf16' if flags.bf16 else 'fp32'} | torch {torch.__version__}, {time.strftime('%d %B %Y')} | medians of "
        f"{flags.steps} steps after {UNCOUNTED} | bytes counted for nodes of {flags.ranks_per_node}",
        *table(variants),
    ]
    for topk in flags.topk:
        first, *others = [variant.losses for variant in variants if variant.topk == topk]
        worst = max((abs(a / b - 1) for losses in others for a, b in zip(losses, first, strict=True)), default=0.0)
        lines.append(f"top-{topk}: largest relative difference of the losses of the dispatchers: {worst:.1e}")
    return lines


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dispatchers", nargs="+", default=DISPATCHERS, metavar="NAME")
    parser.add_argument("--topk", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=10, help=f"timed steps of each, after {UNCOUNTED} that are not")
    parser.add_argument("--ranks", type=int, default=4, help="ranks to start here, if torchrun has not")
    parser.add_argument("--ranks-per-node", type=int, default=2, help="of the nodes that bytes are counted for")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--ffn", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2, help="sequences of a rank")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Be a rank, or start some."""
    flags = parse(argv)
    if "RANK" not in os.environ:
        words = sys.argv[1:] if argv is None else list(argv)
        launch = [sys.executable, "-m", "megatron_moe.torchrun", "--nproc-per-node", str(flags.ranks), __file__]
        raise SystemExit(subprocess.run([*launch, *words], check=False).returncode)
    lines = run_rank(flags)
    import torch.distributed as dist

    from megatron_moe.runtime.distributed import stop

    if dist.get_rank() == 0:
        print("\n".join(lines), flush=True)
    stop()


if __name__ == "__main__":
    run_entry_point(main)
